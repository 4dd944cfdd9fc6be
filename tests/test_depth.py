"""Reading experts as deep as their batch needs: the choice against its twin, guards, groups, and bytes by hand."""

from __future__ import annotations

import pytest
import torch
from harness import Trial, many_examples, trials
from hypothesis import given
from hypothesis import strategies as st
from layer_statistics import planes
from policies_under_test import ROWS
from torch import Tensor

from carpool import Batch, CarpoolError, Outcome, RouteSpec, parse, route
from carpool.policies.depth_prices import increments
from carpool.routing.spec import ALL_BITS

ROW = next(row for row in ROWS if row.name == "depth")
CLOSE = 1e-9  # relative, of two levels that a twin in other arithmetic may confuse


def depth_of(trial: Trial, outcome: Outcome) -> Tensor:
    found = trial.plan.policy.read_depth(outcome.inputs)
    assert found is not None
    return found


@many_examples
@given(data=st.data())
def test_every_expert_has_the_level_of_least_cost(data: st.DataObject) -> None:
    trial = data.draw(trials(ROW, guards=("",)))
    outcome, stats = trial.run(), trial.stats()
    prepared, inputs = trial.plan.prepare(stats), outcome.inputs
    found_GE, batch = depth_of(trial, outcome), inputs.batch
    stored = stats["planes_shape"][3:].tolist()
    energy_E = (
        stats["depth_energy"].double() if "equal" not in str(trial.plan) else torch.ones(trial.case.experts).double()
    )
    energy_E = energy_E / energy_E.max()

    def share(row: int, expert: int) -> float:
        weights = inputs.native_weight_NE[row].double()
        return float(weights[expert] / weights.sum().clamp_min(1e-30))

    for group in range(batch.num_groups):
        voters = (batch.voter_N & (batch.group_N == group)).nonzero().flatten().tolist()
        of_voters = prepared["cost"][min(len(voters), len(prepared["cost"]) - 1)].tolist()
        used = {expert: sum(share(row, expert) ** 2 for row in voters) for expert in range(trial.case.experts)}
        best = [expert for expert in used if used[expert] >= max(used.values()) - 1e-6]
        for expert, use in used.items():
            cost = {}
            for place, level in enumerate(prepared["level"].tolist()):
                if level in (0, ALL_BITS):
                    error = float(level == 0)
                else:
                    error = float(stats["depth_error"][stored.index(level), expert])
                cost[level] = use * float(energy_E[expert]) * error + of_voters[place]
            chosen = int(found_GE[group, expert])
            if expert in best and chosen == min(level for level in cost if level > 0):
                continue  # the expert that is used most is read at least like that
            assert cost[chosen] <= min(cost.values()) * (1 + CLOSE) + 1e-7


@many_examples
@given(data=st.data())
def test_pairs_are_read_at_their_groups_depth_and_exempt_rows_in_full(data: st.DataObject) -> None:
    trial = data.draw(trials(ROW))
    outcome = trial.run()
    depth_NK, batch = outcome.routing.depth_NK, outcome.inputs.batch
    assert depth_NK is not None
    assert (depth_NK[batch.exempt_N] == ALL_BITS).all()
    offered = {*trial.plan.prepare(trial.stats())["level"].tolist(), ALL_BITS} - {0}
    assert set(depth_NK.flatten().tolist()) <= offered
    for group in range(batch.num_groups):
        rows_N = (batch.group_N == group) & ~batch.exempt_N
        for expert in range(trial.case.experts):
            used = depth_NK[rows_N][outcome.routing.ids_NK[rows_N] == expert]
            assert len(set(used.tolist())) <= 1, "a group reads an expert at one depth"
    bits_SE = torch.zeros_like(outcome.depth_SE)
    for row in range(trial.case.rows):
        for slot, expert in enumerate(outcome.routing.ids_NK[row].tolist()):
            if outcome.routing.weights_NK[row, slot] != 0:
                step = int(batch.step_N[row])
                bits_SE[step, expert] = max(int(bits_SE[step, expert]), int(depth_NK[row, slot]))
    assert torch.equal(outcome.depth_SE, bits_SE)


@many_examples
@given(data=st.data(), depth=st.sampled_from([None, 2, 3, 4]), tau=st.sampled_from([0.0, 0.1, 0.4, 1.0]))
def test_the_floor_bounds_what_is_read_too_shallow(data: st.DataObject, depth: int | None, tau: float) -> None:
    trial = data.draw(trials(ROW, guards=("",)))
    floor = f" | floor({tau})" if depth is None else f" | floor({tau}, depth={depth})"
    plan = parse(f"{trial.plan}{floor}")
    outcome = trial.run(plan=plan)
    depth_NK = outcome.routing.depth_NK
    assert depth_NK is not None
    deepest = int(plan.prepare(trial.stats())["deepest"])
    least = deepest if depth is None else min(depth, deepest)
    weight_NK, native_NK = outcome.inputs.native_weight_NK, outcome.inputs.native_ids_NK
    for row in range(trial.case.rows):
        bits = dict(zip(outcome.routing.ids_NK[row].tolist(), depth_NK[row].tolist(), strict=True))
        pairs = zip(native_NK[row].tolist(), weight_NK[row].tolist(), strict=True)
        shallow = sum(weight for expert, weight in pairs if bits.get(expert, 0) < least)
        assert shallow <= tau * float(weight_NK[row].sum()) * (1 + 1e-12)


@given(data=st.data())
def test_other_groups_do_not_change_how_deep_a_group_reads(data: st.DataObject) -> None:
    trial = data.draw(trials(ROW, rows=(6, 8, 17)))
    case = trial.case
    group_N = torch.arange(case.rows) % 2
    case = case.given_also(group_N=group_N, num_groups=2)
    other_NE = torch.where((group_N == 1).unsqueeze(-1), case.logits_NE.flip(-1), case.logits_NE)
    one, other = trial.run(case), trial.run(case.with_logits(other_NE))
    assert one.routing.depth_NK is not None
    assert other.routing.depth_NK is not None
    assert torch.equal(one.routing.depth_NK[group_N == 0], other.routing.depth_NK[group_N == 0])


def routed(text: str, rows: int = 4, **batch: object) -> Outcome:
    plan, generator = parse(text), torch.Generator().manual_seed(0)
    stats = plan.prepare(planes(6, generator))
    logits_NE = torch.randn(rows, 6, generator=generator) * 2
    return route(plan, RouteSpec(top_k=2), logits_NE, Batch.of(rows, **batch), stats=stats)


def test_bits_is_a_cap_and_the_floor_counts_from_it() -> None:
    outcome = routed("topk(k=2) | bits(3)")
    assert outcome.routing.depth_NK is not None
    assert (outcome.routing.depth_NK == 3).all()
    assert outcome.changed_N.all(), "native experts with fewer bits are no native routing"
    assert outcome.displaced_N.sum() == 0
    capped = routed("depth(price=0) | bits(3) | floor(0.1)").routing.depth_NK
    assert capped is not None
    assert (capped == 3).all()
    prompt = routed("topk(k=2) | bits(3)", exempt_N=torch.tensor([True, False, False, False])).routing.depth_NK
    assert prompt is not None
    assert prompt[0].tolist() == [ALL_BITS, ALL_BITS]


def test_a_lone_row_reads_less_too() -> None:
    depth_NK = routed("depth(bytes=0.2) | min_batch(4)", rows=1).routing.depth_NK
    assert depth_NK is not None
    assert (depth_NK < ALL_BITS).all()
    assert parse("depth(bytes=0.2) | min_batch(4)").least_voters == 1


def test_the_price_leads_to_the_bytes_that_were_asked_for() -> None:
    """On the very batches that it was found with."""
    stats = planes(16, torch.Generator().manual_seed(1))
    for wanted in (0.12, 0.2, 0.27):
        prepared = parse(f"depth(bytes={wanted})").prepare(stats)
        size = {0: 0.0, **dict(zip([2, 3, 4], stats["depth_bytes"].tolist(), strict=True))}
        for octave, use_SE in enumerate(stats["depth_use"]):
            error_EJ = prepared["error"] * 2**28  # a unit of fixed-point use
            lost_SEJ = use_SE.double().unsqueeze(-1) * error_EJ + prepared["cost"][2**octave]
            levels = prepared["level"][lost_SEJ.argmin(-1)]
            read = sum(size[level] for level in levels.flatten().tolist()) / use_SE.numel()
            assert read <= wanted
            assert read == pytest.approx(wanted, abs=0.02)


def test_what_it_refuses() -> None:
    stats = planes(6, torch.Generator().manual_seed(0))
    for text, said in (
        ("depth()", "give one of"),
        ("depth(bytes=0.2, price=1)", "give one of"),
        ("depth(bytes=2)", "float in"),
        ("depth(price=-1)", "0 or more"),
        ("depth(price=1, levels=[4, 2])", "ascending"),
        ("depth(price=1, energy='all')", "'expert' or 'equal'"),
        ("topk(1) | bits(0)", "1 to 16"),
        ("topk(1) | bits(3) | floor(0.1, depth=99)", "1 to 16"),
    ):
        with pytest.raises(CarpoolError, match=said):
            parse(text)
    for text, said in (
        ("depth(price=1, levels=[0, 5])", r"use 0, \[2, 3, 4\] and 16"),
        ("depth(bytes=0.9)", "read 0.026 to 0.281 of stock's bytes"),  # all six experts are in use: a sixth of 0.156
        ("depth(bytes=0.02)", "read 0.026 to 0.281 of stock's bytes"),
        ("topk(1) | bits(7)", r"stored at \[2, 3, 4\] bits"),
    ):
        with pytest.raises(CarpoolError, match=said):
            parse(text).prepare(stats)


@many_examples
@given(data=st.data(), budget=st.integers(1, 4))
def test_two_levels_and_a_hard_budget_are_base_and_xshare(data: st.DataObject, budget: int) -> None:
    """With {0, all}: the coreset of BASE if every expert's energy is the same in all rows (and the router's weights
    sum to one), and that of XShare on the squared weights of native experts."""
    trial = data.draw(trials(ROW, guards=("",)))
    case, spec = trial.case, trial.case.spec
    budget = min(budget, case.experts)
    plan = parse(f"depth(budget={budget}, levels=[0, 16])")
    stats = trial.stats()
    outcome = route(plan, spec, case.logits_NE, case.batch, stats=plan.prepare(stats))
    inputs = outcome.inputs
    share_NE = inputs.native_weight_NE / inputs.native_weight_NE.sum(-1, keepdim=True, dtype=torch.float64).float()
    share_NE = share_NE.nan_to_num()
    energy_E = (stats["depth_energy"].double() / stats["depth_energy"].double().max()).float()
    rank_GE = inputs.utility_rank(inputs.utility(share_NE.square()))
    equal = parse(f"depth(budget={budget}, levels=[0, 16], energy='equal')")
    same = route(equal, spec, case.logits_NE, case.batch, stats=equal.prepare(stats))
    costly_GE = ~same.inputs.free_GE & (same.inputs.voters_G1 > 0)
    if not same.inputs.free_GE.any():  # what is free is not counted against XShare's budget
        assert torch.equal(same.coreset_GE & costly_GE, (rank_GE < budget) & costly_GE)
    # BASE with a predictor that knows no input: the largest sums of squared weight times energy, rounding aside
    found_GE = plan.policy.read_depth(inputs) > 0
    loss_GE = inputs.utility(share_NE.square()).double() * energy_E
    for group in range(case.batch.num_groups):
        assert int(found_GE[group].sum()) == budget
        kept, left = loss_GE[group][found_GE[group]], loss_GE[group][~found_GE[group]]
        assert not len(left) or float(left.max()) <= float(kept.min()) * (1 + 1e-6)


@many_examples
@given(data=st.data(), budget=st.integers(1, 4))
def test_a_hard_budget_holds(data: st.DataObject, budget: float) -> None:
    trial = data.draw(trials(ROW, guards=("",)))
    plan, stats = parse(f"depth(budget={min(budget, trial.case.experts)})"), trial.stats()
    outcome = trial.run(plan=plan)
    found_GE = plan.policy.read_depth(outcome.inputs)
    assert found_GE is not None
    size = {0: 0.0, **dict(zip([2, 3, 4], stats["depth_bytes"].tolist(), strict=True))}
    for level_E in found_GE.tolist():
        assert sum(size[level] for level in level_E) <= budget + 1e-6


def test_increments_are_the_lower_hull() -> None:
    error_EJ = torch.tensor([[0.0, 0.1, 0.5, 1.0], [0.0, 0.6, 0.5, 1.0], [0.2, 0.2, 0.2, 1.0]]).double()
    size_J = torch.tensor([1.0, 0.5, 0.25, 0.0]).double()
    gain_EJ, added_EJ = increments(error_EJ, size_J)
    assert gain_EJ[0].tolist() == pytest.approx([0.2, 1.6, 2.0, -1.0])
    assert gain_EJ[1].tolist() == pytest.approx([0.5 / 0.75, -1.0, 2.0, -1.0])
    assert gain_EJ[2].tolist()[2] == pytest.approx(3.2)
    assert added_EJ[1].tolist() == pytest.approx([0.75, 0.0, 0.25, 0.0])
