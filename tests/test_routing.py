"""The routing rules of models, against plain Python in double precision, and exact arithmetic on scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, specs

from carpool import Batch, CarpoolError, Plan, RouteSpec, parse, route
from carpool.routing.exact import MAX_ROWS, ordered_int, rank_descending, to_fixed
from carpool.routing.keys import MAX_EXPERTS, tie_order, with_ties


def by_hand(spec: RouteSpec, logits: list[float]) -> dict[int, float]:
    """One row's experts and weights by the rule that `RouteSpec` documents."""
    experts = range(len(logits))
    if spec.scoring == "sigmoid":
        weight = [1 / (1 + math.exp(-x)) for x in logits]
    elif spec.scoring == "sqrtsoftplus":
        weight = [math.sqrt(math.log1p(math.exp(x))) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        weight = [math.exp(x) / total for x in logits]
    choice = weight if spec.bias_E is None else [w + b for w, b in zip(weight, spec.bias_E.tolist(), strict=True)]
    if spec.scoring == "softmax_after_topk":
        choice = logits
    size = len(logits) // spec.num_groups
    members = [[e for e in experts if e // size == group] for group in range(spec.num_groups)]
    best = [sorted((choice[e] for e in group), reverse=True) for group in members]
    score = [b[0] if spec.group_score == "max" else sum(b[:2]) for b in best]
    kept = sorted(range(spec.num_groups), key=lambda group: -score[group])[: spec.kept_groups]
    candidates = [e for e in experts if e // size in kept]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: spec.top_k]
    result = {e: weight[e] for e in chosen}
    if spec.renormalize or spec.scoring == "softmax_after_topk":
        total = sum(result.values()) + spec.renormalize_eps
        result = {e: w / total for e, w in result.items()}
    scale = [1.0] * len(logits) if spec.per_expert_scale_E is None else spec.per_expert_scale_E.tolist()
    return {e: w * spec.scaling * scale[e] for e, w in result.items()}


@given(data=st.data())
@pytest.mark.parametrize("experts", [4, 16, 64])
def test_native_routing(data: st.DataObject, experts: int) -> None:
    spec = replace(data.draw(specs(experts)), score_in_logits_dtype=False, weight_dtype=None)
    spec.check(experts)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits_NE = torch.stack([torch.randperm(experts, generator=generator) for _ in range(3)]) * (8.0 / experts) - 4.0
    native = spec.native(logits_NE)
    assert native.ids_NK.dtype == torch.int32
    for logits, ids, weights in zip(
        logits_NE.tolist(), native.ids_NK.tolist(), native.weights_NK.tolist(), strict=True
    ):
        expected = by_hand(spec, logits)
        assert set(ids) == set(expected)
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(expected, rel=1e-5)


@given(data=st.data())
def test_native_is_finite_and_sorted(data: st.DataObject) -> None:
    case = data.draw(cases(troubled=False))
    native = case.spec.native(case.logits_NE)
    assert native.weights_NK.isfinite().all()
    choice_NE, _ = case.spec.scores(case.logits_NE)
    kept_NE = case.spec.in_kept_groups(choice_NE)
    if kept_NE is not None:
        assert kept_NE.gather(-1, native.ids_NK.long()).all()
    picked_NK = choice_NE.gather(-1, native.ids_NK.long())
    assert (picked_NK.diff(dim=-1) <= 0).all()


def test_a_row_with_masked_experts_keeps_the_models_routing() -> None:
    """-inf marks experts that a model switched off; the row is native, and native is among the others."""
    logits_NE = torch.tensor([[0.0, 1.0, -torch.inf, 2.0], [0.0, 1.0, 3.0, 2.0]])
    outcome = route(parse("oea(1)"), RouteSpec(top_k=2), logits_NE, Batch.of(2))
    assert outcome.nonfinite_N.tolist() == [True, False]
    assert outcome.routing.ids_NK[0].tolist() == [3, 1]
    assert outcome.routing.weights_NK[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert outcome.routing.ids_NK[1].tolist() == [2, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_gets_finite_weights(bad: float) -> None:
    outcome = route(parse("oea(1)"), RouteSpec(top_k=2), torch.tensor([[0.0, bad, 1.0, 2.0]]), Batch.of(1))
    assert outcome.routing.weights_NK.isfinite().all()
    assert outcome.nonfinite_N.all()
    assert not outcome.changed_N.any()


@pytest.mark.parametrize(
    ("spec", "experts", "message"),
    [
        (RouteSpec(top_k=0), 8, "top_k=0"),
        (RouteSpec(top_k=9), 8, "top_k=9 does not fit 8 experts"),
        (RouteSpec(top_k=2), MAX_EXPERTS + 1, "handles up to 2048"),
        (RouteSpec(top_k=2, num_groups=3), 8, "do not divide"),
        (RouteSpec(top_k=2, num_groups=2, kept_groups=3), 8, "do not divide"),
        (RouteSpec(top_k=2, num_groups=4, kept_groups=0), 8, "do not divide"),
        (RouteSpec(top_k=5, num_groups=4, kept_groups=2), 8, "hold fewer than top_k=5"),
        (RouteSpec(top_k=2, num_groups=8, kept_groups=2, group_score="top2"), 8, "no best two"),
    ],
)
def test_rules_that_no_model_has(spec: RouteSpec, experts: int, message: str) -> None:
    with pytest.raises(CarpoolError, match=message):
        spec.check(experts)


def test_too_many_rows() -> None:
    with pytest.raises(CarpoolError, match="split the pass"):
        Batch.of(MAX_ROWS + 1)


# -- exact arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 64, 512, MAX_EXPERTS])
def test_the_tie_order_is_an_order(experts: int) -> None:
    order = tie_order(experts).tolist()
    assert len(set(order)) == experts
    assert all(0 <= number < MAX_EXPERTS for number in order)


def test_ties_do_not_favour_low_ids() -> None:
    winners = rank_descending(with_ties(torch.zeros(1, 128, dtype=torch.int64)), torch.arange(128))[0].argsort()[:32]
    assert 40 < winners.float().mean() < 88


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_expert_groups_that_tie_go_by_their_number(group_score: str) -> None:
    """Whoever computes it comes to the same groups."""
    spec = RouteSpec(top_k=2, num_groups=8, kept_groups=3, group_score=group_score)
    scores_NE = torch.tensor([[0.5] * 16, [0.25] * 6 + [0.5] * 2 + [0.25] * 8])
    kept_NE = spec.in_kept_groups(scores_NE)
    assert kept_NE.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=40))
def test_integers_in_the_order_of_floats(values: list[float]) -> None:
    numbers = ordered_int(torch.tensor(values)).tolist()
    assert all(0 <= number < 2**32 for number in numbers)
    for a, x in zip(numbers, values, strict=True):
        for b, y in zip(numbers, values, strict=True):
            assert (a < b) == (x < y)


@given(st.floats(0, 100, width=32))
def test_fixed_point(value: float) -> None:
    assert to_fixed(torch.tensor([value])).item() / 2**28 == pytest.approx(min(value, 15.99), abs=2**-28, rel=1e-6)


def test_column_sums_do_not_depend_on_the_order_of_rows() -> None:
    """A float sum does, on the same numbers."""
    weights_NE = torch.rand(500, 4, generator=torch.Generator().manual_seed(1))
    order_N = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    assert torch.equal(to_fixed(weights_NE).sum(0), to_fixed(weights_NE[order_N]).sum(0))
    assert not torch.equal(sum(weights_NE.unbind()), sum(weights_NE[order_N].unbind()))


@pytest.mark.parametrize("scoring", ["softmax", "softmax_after_topk", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("experts", [33, 60, 128])
def test_a_rows_scores_do_not_depend_on_its_place(scoring: str, experts: int) -> None:
    """Vectorised kernels end a tensor with another exp than the one for its bulk."""
    spec = RouteSpec(top_k=2, scoring=scoring)
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(40, experts, generator=generator) * 3
    together = spec.scores(logits_NE)[1]
    for row in range(40):
        assert torch.equal(spec.scores(logits_NE[row : row + 1])[1][0], together[row])


def test_scores_in_16_bits_round_where_routers_round() -> None:
    """Once more after the softplus; or close scores change places and the router seems to follow another rule."""
    spec = RouteSpec(top_k=6, scoring="sqrtsoftplus", score_in_logits_dtype=True)
    logits_NE = torch.randn(500, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(spec.scores(logits_NE)[0], torch.nn.functional.softplus(logits_NE).sqrt())


def test_probabilities_are_scores_already() -> None:
    logits_NE = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    shown = RouteSpec(top_k=4, scoring="probabilities").native(logits_NE.softmax(-1))
    native = RouteSpec(top_k=4).native(logits_NE)
    assert torch.equal(shown.ids_NK, native.ids_NK)
    assert torch.equal(shown.weights_NK, native.weights_NK)


def test_a_group_of_steps_in_one_pass() -> None:
    """Lockstep evaluation runs the positions of a text as the groups of one pass: the same as one pass each."""
    logits_NE = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    position_N = torch.arange(12) % 3
    plan, spec = Plan(parse("xshare(budget=5)").policy), RouteSpec(top_k=4)
    batch = Batch.of(12, group_N=position_N, num_groups=3, step_N=position_N, num_steps=3)
    together = route(plan, spec, logits_NE, batch)
    for position in range(3):
        rows_N = position_N == position
        alone = route(plan, spec, logits_NE[rows_N], Batch.of(4))
        assert torch.equal(alone.routing.ids_NK, together.routing.ids_NK[rows_N])
        assert torch.equal(alone.routing.weights_NK, together.routing.weights_NK[rows_N])
        assert torch.equal(alone.union_SE[0], together.union_SE[position])
