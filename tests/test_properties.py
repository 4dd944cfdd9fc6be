"""The contracts that hold for every policy, on any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import GUARDS, Trial, a_host, assert_same, many_examples, trials
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS, Row
from strategies import Case, logits_of

from carpool import Outcome, Plan, RouteSpec, parse
from carpool.plans.guards import Floor, Regret
from carpool.policies import Policy, policies

every_policy = pytest.mark.parametrize("row", ROWS, ids=repr)


def other_content(case: Case, rows_N: torch.Tensor, salt: int) -> Case:
    """The same case with new logits in these rows."""
    generator = torch.Generator().manual_seed(case.seed + 1 + salt)
    new_NE = logits_of("normal", case.rows, case.experts, generator) * 5
    return case.with_logits(torch.where(rows_N.unsqueeze(-1), new_NE.to(case.logits_NE.dtype), case.logits_NE))


def finite(case: Case) -> torch.Tensor:
    return case.logits_NE.isfinite().all(-1)


@every_policy
@given(data=st.data())
def test_the_identity_setting_is_native_bit_for_bit(row: Row, data: st.DataObject) -> None:
    if not row.identity(4, 2):
        pytest.skip("it has none")
    trial = data.draw(trials(row, identity=True))
    host = a_host(trial.case)
    outcome = trial.run(native=host)
    batch = trial.case.batch
    ended_N = batch.real_N & ~batch.voter_N & ~batch.exempt_N & finite(trial.case)  # no vote, and nobody reads them
    assert_same(outcome.routing, host, ~ended_N)
    assert not (outcome.changed_N & ~ended_N).any()
    assert ended_N.any() or torch.equal(outcome.union_SE, outcome.natural_SE)


@every_policy
@many_examples
@given(data=st.data())
def test_rows_that_keep_their_experts_get_the_hosts_own_output(row: Row, data: st.DataObject) -> None:
    trial = data.draw(trials(row))
    host = a_host(trial.case)
    outcome = trial.run(native=host)
    batch = trial.case.batch
    assert_same(outcome.routing, host, ~outcome.changed_N)
    untouched_N = batch.exempt_N | ~batch.real_N | ~finite(trial.case)
    assert not (outcome.changed_N & untouched_N).any()
    if any(guard.name == "decode_only" for guard in trial.plan.guards):
        assert not (outcome.changed_N & trial.case.given.get("prefill_N", torch.zeros_like(untouched_N))).any()


@every_policy
@many_examples
@given(data=st.data())
def test_a_valid_routing_comes_out(row: Row, data: st.DataObject) -> None:
    trial = data.draw(trials(row))
    outcome, spec = trial.run(), trial.case.spec
    ids_NK, weights_NK = outcome.routing.ids_NK, outcome.routing.weights_NK
    assert ids_NK.dtype == torch.int32
    assert ids_NK.shape == weights_NK.shape == (trial.case.rows, spec.top_k)
    assert weights_NK.dtype == spec.native(trial.case.logits_NE).weights_NK.dtype
    assert weights_NK.isfinite().all()
    assert (weights_NK >= 0).all()
    assert ((ids_NK >= 0) & (ids_NK < trial.case.experts)).all()
    for ids, weights in zip(ids_NK.tolist(), weights_NK.tolist(), strict=True):
        used = [expert for expert, weight in zip(ids, weights, strict=True) if weight != 0]
        assert len(used) == len(set(used))
        assert {ids[slot] for slot in range(len(ids)) if ids[slot] in ids[:slot]} <= {ids[0]}
    renormalized = spec.renormalize and getattr(trial.plan.policy, "renormalize", True)
    if renormalized and spec.per_expert_scale_E is None and trial.case.rows:
        tolerance = 2e-2 if weights_NK.dtype != torch.float32 else 1e-5
        if spec.renormalize_eps == 0:
            given_NK, left_NK = weights_NK.float(), outcome.routing.surrogate_weights_NK
            given_NK = given_NK if left_NK is None else given_NK + left_NK
            assert (given_NK.sum(-1) / spec.scaling - 1).abs().max() < tolerance


@every_policy
@many_examples
@given(data=st.data())
def test_slots_are_filled_in_order(row: Row, data: st.DataObject) -> None:
    """Native members first, then members in the model's expert groups, then any; never anything else."""
    trial = data.draw(trials(row))
    outcome = trial.run()
    kept_NE = trial.case.spec.in_kept_groups(outcome.inputs.scores_NE)
    for index in outcome.changed_N.nonzero().flatten().tolist():
        computed, allowed = outcome.computed_NE[index], outcome.allowed_NE[index]
        native = outcome.inputs.native_NE[index]
        assert not (computed & ~allowed).any()
        assert computed.any()
        assert ((native & allowed) <= computed).all(), "an allowed native expert was passed over"
        if type(trial.plan.policy).assign is Policy.assign:
            assert computed.sum() == min(trial.case.spec.top_k, int(allowed.sum()))
            inside = allowed if kept_NE is None else allowed & kept_NE[index]
            if (computed & ~native & ~inside).any():
                assert (inside <= computed).all(), "an expert outside the row's groups came before one inside"


@every_policy
@many_examples
@given(data=st.data())
def test_silent_rows_change_nothing_for_others(row: Row, data: st.DataObject) -> None:
    """Padding, finished sequences and non-finite rows may hold anything."""
    trial = data.draw(trials(row, rows=(2, 5, 8, 17)))
    case = trial.case
    generator = case.generator()
    kind_N = torch.randint(0, 4, (case.rows,), generator=generator)
    real_N = case.batch.real_N & (kind_N != 0)
    voter_N = case.batch.voter_N & (kind_N != 1)
    logits_NE = case.logits_NE.clone()
    logits_NE[kind_N == 2, 0] = torch.nan
    case = case.given_also(real_N=real_N, voter_N=voter_N).with_logits(logits_NE)
    batch = case.batch
    # exempt rows have no vote but are heard: what they read is free; so are prompt rows under `decode_only`
    prompt_N = case.given.get("prefill_N", torch.zeros_like(real_N))
    silent_N = ~real_N | (~batch.voter_N & ~batch.exempt_N & ~prompt_N) | ~finite(case)
    changed = other_content(case, silent_N, 0)
    logits_NE = changed.logits_NE.clone()
    logits_NE[~finite(case), case.experts - 1] = torch.inf  # a non-finite row stays one
    before, after = trial.run(case), trial.run(changed.with_logits(logits_NE))
    assert_same(before.routing, after.routing, ~silent_N)
    assert torch.equal(before.coreset_GE, after.coreset_GE)


@every_policy
@given(data=st.data())
def test_order_does_not_matter(row: Row, data: st.DataObject) -> None:
    """Neither the order of rows nor the numbers of groups."""
    trial = data.draw(trials(row, rows=(2, 3, 5, 8, 17)))
    case = trial.case
    order_N = torch.randperm(case.rows, generator=case.generator())
    groups = case.given["num_groups"]
    relabel_G = torch.randperm(groups, generator=case.generator())
    permuted = case.rows_at(order_N)
    permuted = permuted.given_also(group_N=relabel_G[permuted.given["group_N"]])
    before, after = trial.run(), trial.run(permuted)
    assert torch.equal(before.routing.ids_NK[order_N], after.routing.ids_NK)
    assert torch.equal(before.routing.weights_NK[order_N], after.routing.weights_NK)
    assert torch.equal(before.coreset_GE, after.coreset_GE[relabel_G])


def as_knob(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


@every_policy
@given(data=st.data())
def test_a_lone_row_is_native_under_min_batch(row: Row, data: st.DataObject) -> None:
    trial = data.draw(trials(row, guards=(" | min_batch(2)", " | min_batch(3) | short_circuit")))
    outcome = trial.run()
    if trial.plan.policy.kind == "token" or trial.plan.policy.alone:
        bare = trial.run(plan=Plan(trial.plan.policy))
        assert_same(outcome.routing, bare.routing)
        return
    group_N, voter_N = trial.case.batch.group_N, trial.case.batch.voter_N & finite(trial.case)
    few_N = torch.bincount(group_N[voter_N], minlength=9)[group_N] < 2
    assert not (outcome.changed_N & few_N).any()


@every_policy
@given(data=st.data())
def test_token_local_policies_look_at_one_row(row: Row, data: st.DataObject) -> None:
    trial = data.draw(trials(row, rows=(1, 3, 8), guards=("", " | protect([1]) | floor(0.2)")))
    if trial.plan.policy.kind != "token":
        return
    together = trial.run()
    for index in range(trial.case.rows):
        alone = trial.run(trial.case.rows_at(torch.tensor([index])))
        assert torch.equal(together.routing.ids_NK[index], alone.routing.ids_NK[0])
        assert torch.equal(together.routing.weights_NK[index], alone.routing.weights_NK[0])


@every_policy
@given(data=st.data())
def test_groups_do_not_hear_each_other(row: Row, data: st.DataObject) -> None:
    """With `group="request"` a request does not depend on the others, prompts that run in its step included."""
    trial = data.draw(trials(row, rows=(3, 5, 8, 17)))
    others_N = trial.case.batch.group_N != 0
    before, after = trial.run(), trial.run(other_content(trial.case, others_N, 1))
    assert_same(before.routing, after.routing, ~others_N)
    assert torch.equal(before.coreset_GE[0], after.coreset_GE[0])


@every_policy
@given(data=st.data())
def test_steps_do_not_mix(row: Row, data: st.DataObject) -> None:
    """What another step reads is not free."""
    trial = data.draw(trials(row, rows=(5, 8, 17)))
    groups = trial.case.given["num_groups"]
    case = trial.case.given_also(step_N=trial.case.given["group_N"], num_steps=groups)
    others_N = case.batch.step_N != 0
    before, after = trial.run(case), trial.run(other_content(case, others_N, 2))
    assert_same(before.routing, after.routing, ~others_N)
    assert torch.equal(before.union_SE[0], after.union_SE[0])


def free_of(outcome: Outcome) -> torch.Tensor:
    """Experts that exempt rows of each group read, `[G, E]`, by loops."""
    inputs, batch = outcome.inputs, outcome.inputs.batch
    free_GE = torch.zeros_like(outcome.coreset_GE)
    for group in set(batch.group_N.tolist()):
        for index in (batch.exempt_N & batch.real_N & (batch.group_N == group)).nonzero().flatten():
            free_GE[group, inputs.native_ids_NK[index].long()] = True
    return free_GE


@every_policy
@given(data=st.data())
def test_the_coreset_keeps_its_size_and_bounds_what_is_read(row: Row, data: st.DataObject) -> None:
    """Union within the coresets plus free, floor, protected and critical experts; budgets hold, free ones uncharged."""
    trial = data.draw(trials(row, guards=("", " | floor(0.3)", " | short_circuit")))
    outcome = trial.run()
    policy, spec, batch = trial.plan.policy, trial.case.spec, outcome.inputs.batch
    free_GE = free_of(outcome)
    assert (free_GE <= outcome.coreset_GE).all()
    floored = any(guard.name == "floor" for guard in trial.plan.guards)
    for group in range(batch.num_groups):
        voters = int((batch.voter_N & (batch.group_N == group)).sum())
        if not voters:
            continue
        coreset = outcome.coreset_GE[group]
        if row.coreset_bound is not None:
            bound = row.coreset_bound(policy, trial.case.experts, spec.top_k, voters)
            assert (coreset & ~free_GE[group]).sum() <= bound
        members_N = (batch.group_N == group) & ~batch.exempt_N
        outside_NE = outcome.computed_NE[members_N] & ~coreset
        assert not (outside_NE & ~outcome.inputs.native_NE[members_N]).any()
        if row.coreset_bound is not None and not floored and not row.critical:
            assert not outside_NE.any()
    for step in range(batch.num_steps):
        reads_N = batch.step_N == step
        union = outcome.computed_NE[reads_N].any(0)
        assert torch.equal(union, outcome.union_SE[step])
        natural = outcome.inputs.native_NE[reads_N].any(0)
        assert torch.equal(natural, outcome.natural_SE[step])


@every_policy
@given(data=st.data())
def test_knobs_may_be_tensors(row: Row, data: st.DataObject) -> None:
    """0-d device tensors in place of numbers change nothing."""
    trial = data.draw(trials(row, guards=("", " | floor(0.3)")))
    policy, experts = trial.plan.policy, trial.case.experts
    knobs = {}
    for name in row.knobs:
        value = getattr(policy, name)
        if isinstance(value, float) and name in ("budget", "budget_per_device", "request_budget"):
            value = int(value * experts)
        if value is not None:
            knobs[name] = as_knob(value)
    guards = tuple(replace(g, tau=as_knob(g.tau)) if isinstance(g, Floor | Regret) else g for g in trial.plan.guards)
    tensors = Plan(replace(policy, **knobs), guards)
    assert_same(trial.run().routing, trial.run(plan=tensors).routing)


@every_policy
@pytest.mark.parametrize("guards", GUARDS)
def test_no_rows(row: Row, guards: str) -> None:
    """An engine may run a layer for nobody."""
    case = Case(RouteSpec(top_k=2), torch.zeros(0, 8), row.extras(0, 8), 0)
    for text in row.texts(8, 2):
        outcome = Trial(row, case, parse(text + guards)).run()
        assert outcome.routing.ids_NK.shape == (0, 2)
        assert outcome.union_SE.sum() == 0


def test_the_matrix_is_complete() -> None:
    """Every registered policy is under test."""
    assert sorted(row.name for row in ROWS) == sorted(policies())
    for row in ROWS:
        assert {text.split("(")[0] for text in row.texts(16, 4) + row.identity(16, 4)} == {row.name}
