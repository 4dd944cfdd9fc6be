"""One example per method, worked by hand: six experts, two a token, three tokens. Comments give the sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carpool import Batch, Outcome, RouteSpec, parse, route

P_NE = torch.tensor(
    [
        [0.40, 0.30, 0.15, 0.05, 0.06, 0.04],  # native 0, 1
        [0.05, 0.10, 0.35, 0.30, 0.15, 0.05],  # native 2, 3
        [0.45, 0.05, 0.02, 0.08, 0.10, 0.30],  # native 0, 5
    ]
)
# column sums: 0.90, 0.45, 0.52, 0.43, 0.31, 0.39


def routed(text: str, *, given: dict | None = None, stats: dict[str, Tensor] | None = None) -> Outcome:
    plan = parse(text)
    spec = RouteSpec(top_k=2)
    plan.check(6, 2)
    return route(plan, spec, P_NE.log(), Batch.of(3, **(given or {})), stats=plan.policy.prepare(stats or {}))


def chosen(outcome: Outcome) -> list[dict[int, float]]:
    """Weights by expert, of each row."""
    rows = zip(outcome.routing.ids_NK.tolist(), outcome.routing.weights_NK.tolist(), strict=True)
    return [{e: round(w, 4) for e, w in zip(ids, weights, strict=True) if w} for ids, weights in rows]


def coreset(outcome: Outcome, group: int = 0) -> set[int]:
    return set(outcome.coreset_GE[group].nonzero().flatten().tolist())


NATIVE = [{0: 0.5714, 1: 0.4286}, {2: 0.5385, 3: 0.4615}, {0: 0.6, 5: 0.4}]  # 4/7 3/7, 35/65 30/65, 45/75 30/75


def test_native() -> None:
    outcome = routed("topk(2)")
    assert chosen(outcome) == NATIVE
    assert not outcome.changed_N.any()
    assert outcome.union_SE.sum() == 5  # 0 1 2 3 5


def test_topk() -> None:
    outcome = routed("topk(1)")
    assert chosen(outcome) == [{0: 1.0}, {2: 1.0}, {0: 1.0}]
    assert outcome.routing.ids_NK.tolist() == [[0, 0], [2, 2], [0, 0]]  # a freed slot repeats the first id
    assert outcome.displaced_N.tolist() == pytest.approx([3 / 7, 30 / 65, 0.4])


@pytest.mark.parametrize("text", ["oea(k0=1)", "des_seq(k0=1)"])
def test_oea_and_des_seq(text: str) -> None:
    """Best experts 0, 2, 0: everyone fills up from {0, 2}."""
    outcome = routed(text)
    assert coreset(outcome) == {0, 2}
    # 40:15, 35:5, 45:2
    assert chosen(outcome) == [{0: 0.7273, 2: 0.2727}, {2: 0.875, 0: 0.125}, {0: 0.9574, 2: 0.0426}]
    assert outcome.displaced_N.tolist() == pytest.approx([3 / 7, 30 / 65, 0.4])


def test_xshare() -> None:
    """Warm-up {0, 2}; expert 1 has the next largest mass, 0.45 against 0.43 of expert 3."""
    outcome = routed("xshare(budget=3)")
    assert coreset(outcome) == {0, 1, 2}
    # row 1 has 2 and then 1: 35:10; row 2 has 0 and then 1: 45:5
    assert chosen(outcome) == [NATIVE[0], {2: 0.7778, 1: 0.2222}, {0: 0.9, 1: 0.1}]
    assert coreset(routed("xshare(budget=1)")) == {0, 2}  # the warm-up beats the budget
    assert coreset(routed("xshare(budget=1, warmup=0)")) == {0}
    # squares: 0.365, 0.1025, 0.1454, 0.0989, 0.0361, 0.0941
    assert coreset(routed("xshare(budget=2, warmup=0, utility='squared')")) == {0, 2}
    # native only: 0.85, 0.30, 0.35, 0.30, 0, 0.30
    assert coreset(routed("xshare(budget=2, warmup=0, utility='topk_mass')")) == {0, 2}


def test_des_vote() -> None:
    """Votes 0.85, 0.30, 0.35, 0.30, 0, 0.30 for the experts 0 to 5."""
    outcome = routed("des_vote(size=2)")
    assert coreset(outcome) == {0, 2}
    assert chosen(outcome)[1] == {2: 0.875, 0: 0.125}
    assert coreset(routed("des_vote(beta=0.4)")) == {0, 2}  # floor(0.4 * 6) = 2


SIMILARITY = torch.tensor(
    [
        [1.0, 0.2, 0.3, 0.1, 0.1, 0.9],
        [0.7, 1.0, 0.2, 0.1, 0.1, 0.1],
        [0.3, 0.2, 1.0, 0.8, 0.1, 0.1],
        [0.1, 0.1, 0.5, 1.0, 0.1, 0.1],
        [0.1, 0.1, 0.1, 0.1, 1.0, 0.1],
        [0.4, 0.1, 0.2, 0.1, 0.1, 1.0],
    ]
)


def test_sere() -> None:
    """Primaries {0, 2}: 1 goes to 0 (0.7), 3 to 2 (0.5), 5 to 0 (0.4)."""
    stats = {"similarity_frobenius": SIMILARITY}
    outcome = routed("sere(top=1)", stats=stats)
    assert coreset(outcome) == {0, 2}
    assert chosen(outcome) == [{0: 1.0}, {2: 1.0}, {0: 1.0}]  # slots that meet are merged
    assert outcome.displaced_N.tolist() == pytest.approx([3 / 7, 30 / 65, 0.4])
    critical = routed("sere(top=1, threshold=0.5)", stats=stats)  # 0.4 is not enough for expert 5: it stays
    assert chosen(critical) == [{0: 1.0}, {2: 1.0}, NATIVE[2]]
    assert critical.union_SE[0].nonzero().flatten().tolist() == [0, 2, 5]


def test_random_is_a_part_of_the_natural_union() -> None:
    draws = {tuple(sorted(coreset(routed(f"random(2, warmup=0, seed={seed})")))) for seed in range(40)}
    assert all(len(draw) == 2 and set(draw) <= {0, 1, 2, 3, 5} for draw in draws)
    assert len(draws) > 5  # of ten pairs
    draws = {tuple(sorted(coreset(routed(f"random(budget=3, seed={seed})")))) for seed in range(40)}
    assert draws == {(0, 1, 2), (0, 2, 3), (0, 2, 5)}  # 0 and 2 are somebody's best
    assert coreset(routed("random(budget=1)")) == {0, 2}


def test_free_experts_are_not_charged() -> None:
    """Row 1 is a prompt and reads 2 and 3 anyway: the budget buys 0 and 1 on top."""
    outcome = routed("xshare(budget=2, warmup=0)", given={"exempt_N": torch.tensor([False, True, False])})
    # mass of the voters, rows 0 and 2: 0.85, 0.35, 0.17, 0.13, 0.16, 0.34
    assert coreset(outcome) == {0, 1, 2, 3}
    assert chosen(outcome) == [NATIVE[0], NATIVE[1], {0: 0.8491, 3: 0.1509}]  # 45:8


def test_groups_choose_for_themselves() -> None:
    """Rows 0 and 2 share, row 1 is alone with its best expert."""
    given = {"group_N": torch.tensor([0, 1, 0]), "num_groups": 2}
    outcome = routed("oea(1)", given=given)
    assert (coreset(outcome, 0), coreset(outcome, 1)) == ({0}, {2})
    assert chosen(outcome) == [{0: 1.0}, {2: 1.0}, {0: 1.0}]
    assert routed("oea(1) | min_batch(2)", given=given).changed_N.tolist() == [True, False, True]


def test_guards() -> None:
    """Displaced under oea(1): 3/7, 30/65, 0.4."""
    floored = routed("oea(1) | floor(0.42)")
    assert chosen(floored) == [*NATIVE[:2], {0: 0.9574, 2: 0.0426}]
    assert floored.overflow_SE[0].nonzero().flatten().tolist() == [1, 3]
    # expert 3 is protected: row 1 keeps it and row 2, which has no vote on it, may use it
    protected = routed("oea(1) | protect([3])")
    assert coreset(protected) == {0, 2, 3}
    assert chosen(protected)[1:] == [NATIVE[1], {0: 0.8491, 3: 0.1509}]
    # the natural union has five experts
    assert not routed("xshare(budget=5, warmup=0) | short_circuit").changed_N.any()
    assert routed("xshare(budget=4, warmup=0) | short_circuit").changed_N.any()
    prompt = {"prefill_N": torch.tensor([True, True, False])}
    assert coreset(routed("oea(1) | decode_only", given=prompt)) == {0, 1, 2, 3}


def test_short_circuit_does_not_let_finished_sequences_read_more() -> None:
    """Rows 0 and 2 vote and read {0, 1, 5}; row 1 is finished and has to fit in, though the
    budget would buy its expert 2 as well."""
    outcome = routed("xshare(budget=4, warmup=0) | short_circuit", given={"voter_N": torch.tensor([True, False, True])})
    assert coreset(outcome) == {0, 1, 5}
    # for row 1 experts 0 and 5 tie; 761 + 5 * 1267 is 952 modulo 2048, more than the 761 of expert 0
    assert chosen(outcome) == [NATIVE[0], {1: 0.6667, 5: 0.3333}, NATIVE[2]]


def test_floor_zero_is_native_even_where_weights_vanish() -> None:
    """Logits so far apart that the second expert's weight is 0: leaving it out displaces nothing, yet it comes back."""
    logits_NE = torch.tensor([[1e4, -1e4, 0.0, 1.0]])
    plan, spec = parse("topk(1) | floor(0)"), RouteSpec(top_k=2)
    outcome = route(plan, spec, logits_NE, Batch.of(1))
    assert outcome.routing.ids_NK.tolist() == spec.native(logits_NE).ids_NK.tolist()
    assert not outcome.changed_N.any()
