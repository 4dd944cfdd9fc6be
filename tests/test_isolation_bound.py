"""Bounds of docs/isolation.md. The floor's: displaced mass, and with it how far a layer's mixture can move. And what a
step reads: whatever strangers send, not more than natively."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Trial, trials
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_statistics import unexplained
from policies_under_test import ROWS, Row
from torch import Tensor

from carpool import Batch, Plan, RouteSpec, Routing, parse, route
from carpool.plans.guards import Floor


def dense(routing: Routing, experts: int) -> Tensor:
    """Weights of all experts and of their surrogates, `[N, 2 E]`."""
    weights_NX = torch.zeros(len(routing.ids_NK), 2 * experts, dtype=torch.float64)
    weights_NX.scatter_add_(-1, routing.ids_NK.long(), routing.weights_NK.double())
    if routing.surrogate_ids_NK is not None and routing.surrogate_weights_NK is not None:
        weights_NX.scatter_add_(-1, routing.surrogate_ids_NK.long() + experts, routing.surrogate_weights_NK.double())
    return weights_NX


def plain(spec: RouteSpec) -> RouteSpec:
    """A router that ranks by what it mixes by, in full precision."""
    return replace(spec, bias_E=None, num_groups=1, kept_groups=1, per_expert_scale_E=None, weight_dtype=None,
                   renormalize_eps=0.0, scoring="sigmoid" if spec.scoring == "sigmoid" else "softmax")  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=repr)
@given(data=st.data(), tau=st.sampled_from([0.05, 0.3, 0.7, 1.0]))
def test_the_mixture_moves_by_twice_the_displaced_mass(row: Row, data: st.DataObject, tau: float) -> None:
    trial: Trial = data.draw(trials(row, patterns=("normal", "quantised", "peaked"), dtypes=(torch.float32,)))
    case = replace(trial.case, spec=plain(trial.case.spec))
    assume(case.rows > 0)
    plan = Plan(trial.plan.policy, (*(g for g in trial.plan.guards if not isinstance(g, Floor)), Floor(tau)))
    outcome = trial.run(case, plan)
    native_NX = dense(case.spec.native(case.logits_NE.nan_to_num()), case.experts)
    moved_N = (dense(outcome.routing, case.experts) - native_NX).abs().sum(-1) / native_NX.sum(-1)
    changed_N = outcome.changed_N
    assert (moved_N[changed_N] <= 2 * outcome.displaced_N[changed_N] + 1e-5).all()
    assert (moved_N[changed_N] <= 2 * tau + 1e-5).all()


ATTACKED = (
    "xshare(budget=4)", "xshare(4, warmup=0)", "des_vote(size=4)", "oea(1)", "lynx(4)", "random(4)", "surrogate(2)",
)  # fmt: skip


@pytest.mark.parametrize(("guard", "top_k"), [("floor", 4), ("regret", 4), ("regret", 1)])
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.1, 0.3, 0.5]), text=st.sampled_from(ATTACKED))
def test_no_co_batch_beats_a_bound(guard: str, top_k: int, seed: int, tau: float, text: str) -> None:
    """Attackers climb: each takes the row that costs the victim most, in displaced mass or routing probability."""
    generator = torch.Generator().manual_seed(seed)
    victim_E, pool_PE = torch.randn(16, generator=generator), torch.randn(64, 16, generator=generator) * 3
    chosen = torch.randint(64, (5,), generator=generator)
    group_N = torch.arange(64).repeat_interleave(6)
    batch = Batch.of(64 * 6, group_N=group_N, num_groups=64)
    plan, spec = parse(f"{text} | {guard}({tau})"), RouteSpec(top_k=top_k)
    chance_E = victim_E.double().softmax(-1)
    best = chance_E.topk(top_k).values.sum()
    stats = plan.policy.prepare(unexplained(16, generator))
    for place in range(5):
        tried_CA = chosen.repeat(64, 1)
        tried_CA[:, place] = torch.arange(64)
        logits_CBE = torch.cat((victim_E.expand(64, 1, 16), pool_PE[tried_CA]), 1)
        outcome = route(plan, spec, logits_CBE.flatten(0, 1), batch, stats=stats)
        lost_C = outcome.displaced_N.view(64, 6)[:, 0]
        if guard == "regret":
            computed_CE = outcome.computed_NE.view(64, 6, 16)[:, 0]
            lost_C = best - (chance_E * computed_CE).sum(-1)
        assert (lost_C <= tau + (1e-12 if guard == "floor" else 1e-6)).all()
        chosen = tried_CA[lost_C.argmax()]


BUDGETS = ("xshare", "des_vote", "lynx", "base", "random", "surrogate")
UNIONS = ("oea", "des_seq", "sere")  # of what some rows pick natively


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in BUDGETS + UNIONS], ids=repr)
@given(data=st.data(), floor=st.sampled_from(["", " | floor(0.3)"]))
def test_no_step_reads_more_than_natively(row: Row, data: st.DataObject, floor: str) -> None:
    """One group a step. With a floor up to the members of the coreset that nobody natively picks, which are none where
    the coreset is made of what somebody picks."""
    trial: Trial = data.draw(trials(row, guards=(" | short_circuit" + floor,)))
    nought_N = torch.zeros(trial.case.rows, dtype=torch.int64)
    case = trial.case.given_also(group_N=nought_N, step_N=nought_N, num_groups=1, num_steps=1)
    outcome = trial.run(case)
    real_N1 = outcome.inputs.batch.real_N.unsqueeze(-1)  # padding and rows that are not finite stay out
    assume(bool(outcome.inputs.batch.voter_N.any()))
    natural_E, union_E = ((mask_NE & real_N1).any(0) for mask_NE in (outcome.inputs.native_NE, outcome.computed_NE))
    beyond_E = outcome.coreset_GE[0] & ~natural_E
    assert not (union_E & ~natural_E & ~beyond_E).any()
    if not floor:
        assert union_E.sum() <= natural_E.sum()
    if row.name in UNIONS:
        assert not beyond_E.any()
