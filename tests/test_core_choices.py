"""Choices that a small slip in the core would change and random cases seldom show, each by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from test_by_hand import coreset
from torch import Tensor

from carpool import Batch, Outcome, RouteSpec, parse, route


def routed(text: str, p_NE: list[list[float]], top_k: int, stats: Mapping[str, Tensor], **given: object) -> Outcome:
    plan = parse(text)
    plan.check(len(p_NE[0]), top_k)
    batch = Batch.of(len(p_NE), **given)
    logits_NE = torch.tensor(p_NE).log()
    return route(plan, RouteSpec(top_k=top_k), logits_NE, batch, stats=plan.policy.prepare(stats))


UNLIKE = torch.tensor(
    [
        [1.0, -0.2, -0.5, -0.9],
        [-0.2, 1.0, -0.6, -0.3],
        [-0.5, -0.6, 1.0, -0.4],
        [-0.9, -0.3, -0.4, 1.0],
    ]
)


@pytest.mark.parametrize("metric", ["cosine", "routed"])
def test_sere_at_threshold_0_moves_to_the_least_unlike_primary(metric: str) -> None:
    """Primaries 0 and 1. Expert 2 is less unlike 0, expert 3 less unlike 1; no similarity reaches 0."""
    p_NE = [[0.6, 0.1, 0.3, 0.0001], [0.1, 0.6, 0.0001, 0.3]]
    stats = {f"similarity_{metric}": UNLIKE}
    outcome = routed(f"sere(top=1, metric='{metric}')", p_NE, 2, stats)
    assert coreset(outcome) == {0, 1}
    assert outcome.routing.ids_NK.tolist() == [[0, 0], [1, 1]], "2 moved to 0, 3 to 1"
    assert outcome.routing.weights_NK.tolist() == [[pytest.approx(1.0), 0.0], [pytest.approx(1.0), 0.0]]
    stays = routed(f"sere(top=1, threshold=0.01, metric='{metric}')", p_NE, 2, stats)
    assert stays.routing.ids_NK.tolist() == [[0, 2], [1, 3]]
    assert not stays.changed_N.any()


def test_surrogates_weigh_rows_by_the_share_of_what_they_mix() -> None:
    """One row is sure of expert 0, two rows hardly prefer expert 1; all three put their whole output on it. Squared
    shares: 1 against 1 + 1. Squared scores would say 0.81 against 0.32."""
    p_NE = [[0.9, 0.04, 0.03, 0.03], [0.2, 0.4, 0.2, 0.2], [0.2, 0.4, 0.2, 0.2]]
    stats = {"surrogate_energy": torch.ones(4), "surrogate_unexplained": torch.full((4,), 0.5)}
    assert coreset(routed("surrogate(1)", p_NE, 1, stats)) == {1}


def test_overflow_is_what_nobody_else_reads() -> None:
    """Two groups in one step. The floor gives the row of group 0 its expert 1 back, which group 1 reads anyway."""
    p_NE = [[0.55, 0.45, 0.0001, 0.0001], [0.0001, 0.9, 0.1, 0.0001]]
    groups = {"group_N": torch.tensor([0, 1]), "num_groups": 2}
    bare = routed("oea(1)", p_NE, 2, {}, **groups)
    assert [coreset(bare, group) for group in (0, 1)] == [{0}, {1}]
    shared = routed("oea(1) | floor(0.3)", p_NE, 2, {}, **groups)
    assert [set(ids) for ids in shared.routing.ids_NK.tolist()] == [{0, 1}, {1}]
    assert not shared.overflow_SE.any()
    # in a step of its own, or beside padding only, the row reads it because of the floor alone
    for alone in ({"step_N": torch.tensor([0, 1]), "num_steps": 2}, {"real_N": torch.tensor([True, False])}):
        outcome = routed("oea(1) | floor(0.3)", p_NE, 2, {}, **groups, **alone)
        assert outcome.overflow_SE[0].nonzero().flatten().tolist() == [1]
        assert int(outcome.overflow_SE.sum()) == 1


@pytest.mark.parametrize("guards", ["", " | short_circuit", " | min_batch(2) | short_circuit"])
def test_a_group_without_a_voter_keeps_its_routing(guards: str) -> None:
    """Nobody has a say in group 1, so that its natural union, of voters, is empty; that is no coreset to move into."""
    p_NE = [[0.5, 0.3, 0.15, 0.05], [0.45, 0.35, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]
    groups = {"group_N": torch.tensor([0, 0, 1]), "num_groups": 2, "voter_N": torch.tensor([True, True, False])}
    outcome = routed(f"xshare(2){guards}", p_NE, 2, {}, **groups)
    assert outcome.routing.ids_NK[2].tolist() == [3, 2]
    assert not outcome.changed_N.any()


def test_the_floor_acts_at_the_bound_and_not_before() -> None:
    """Single rows that lose one of four experts: a bound just below the loss acts, one just above does not."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        logits_NE = torch.randn(1, 6, generator=generator)
        spec = RouteSpec(top_k=4)
        native = spec.native(logits_NE).ids_NK[0].tolist()
        weights = logits_NE.softmax(-1)[0].double()
        own = sorted(set(range(6)) - {native[1]})
        lost = float(weights[native[1]] / weights[native].sum())
        for tau, acts in ((lost * (1 - 2e-8), True), (lost * (1 + 2e-8), False)):
            outcome = route(parse(f"allow_list({own}) | floor({tau!r})"), spec, logits_NE, Batch.of(1))
            assert bool(outcome.changed_N[0]) != acts
            assert float(outcome.displaced_N[0]) <= tau * (1 + 1e-9)


def test_a_router_scores_in_float32_unless_its_description_says_otherwise() -> None:
    """Most families cast logits in 16 bits before the softmax; ranking in 16 bits would tie what they tell apart."""
    logits_NE = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for scores_NE in RouteSpec(top_k=2).scores(logits_NE):
        assert torch.equal(scores_NE, logits_NE.float().softmax(-1))
    assert RouteSpec(top_k=2, score_in_logits_dtype=True).scores(logits_NE)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "least"),
    [("xshare(2)", 1), ("xshare(2) | min_batch(3) | floor(0.5)", 3), ("topk(1) | min_batch(3)", 1)],
)
def test_from_how_many_voters_on_a_plan_acts(text: str, least: int) -> None:
    """Hosts do not run a plan for fewer; one that looks at single rows acts on any."""
    plan = parse(text)
    assert plan.least_voters == least
    p_NE = [[0.45, 0.35, 0.15, 0.05], [0.05, 0.15, 0.35, 0.45], [0.35, 0.05, 0.45, 0.15]]
    for rows in (1, 2, 3):
        changed_N = routed(text, p_NE[:rows], 2, {}).changed_N
        assert rows >= least or not changed_N.any()
