"""What was tuned, at other batch sizes and beside quantisation alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool import CarpoolError, parse
from carpool.cli.tune_trials import batch_sizes
from carpool.cli.tune_view import elsewhere
from carpool.plans.grammar import Plan
from carpool.tune import Point, Target, at_batches, on_planes
from carpool.tune.at_batches import needed

KL = {2: 0.1, 3: 0.01, 4: 0.001}
SHARE = {2: 0.14, 3: 0.2, 4: 0.27}


class Measured:
    """Stands for trials: uniform quantisation as above, everything else at a quarter of the bytes."""

    def __init__(self, kl: float) -> None:
        self.kl, self.asked = kl, []  # type: ignore[var-annotated]

    def measure(self, plans: Sequence[Plan]) -> list[Point]:
        self.asked += map(str, plans)
        return [self.point(str(plan)) for plan in plans]

    def point(self, name: str) -> Point:
        bits = next((d for d in KL if f"bits({d})" in name), None)
        kl, share = (self.kl, 0.18) if bits is None else (KL[bits], SHARE[bits])
        return Point(name, kl, kl * 0.9, kl * 1.1, 1.0, share)


def at(kl: float, **others: float) -> tuple[list[Any], dict[int, Measured]]:
    trials = {16: Measured(kl), 64: Measured(others.get("busy", kl))}

    def of_size(size: int) -> Any:
        if size not in trials:
            raise CarpoolError("too little text")
        return trials[size]

    plan = parse("depth(bytes=0.25)")
    return at_batches(plan, Target(max_kl=0.02), [4, 16, 64], of_size, (2, 3, 4), 8), trials


def test_it_is_compared_with_the_bits_that_lose_as_much() -> None:
    found, trials = at(0.01**0.5 * 0.001**0.5)
    none, same, busy = found
    assert none.point is None
    assert none.why == "too little text"
    assert same.uniform == pytest.approx((SHARE[3] + SHARE[4]) / 2)
    assert same.met
    assert busy.met
    assert trials[16].asked == ["depth(bytes=0.25)", "topk(k=8) | bits(4)", "topk(k=8) | bits(3)"], (
        "2 bits are no rival"
    )


def test_a_missed_target_is_said() -> None:
    found, _ = at(0.01, busy=0.05)
    said = " ".join(elsewhere(found, 16))
    assert "at batch 4: not measured: too little text" in said
    assert "at batch 64: reads 18.0%, KL 0.0500 (0.0450 to 0.0550), which misses the target" in said
    assert "at batch 16: experts that all have the same bits, of the same file, need 20.0% for that KL" in said
    assert "reads 10% less than quantisation alone" in said
    assert "at batch 16: reads" not in said, "that is said before"


def test_without_planes_nothing_is_claimed() -> None:
    found = at_batches(parse("xshare(budget=4)"), Target(max_kl=0.02), [16], lambda size: Measured(0.01), (), 8)
    assert found[0].uniform is None
    assert "is not known" in elsewhere(found, 16)[-1]


@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=5), st.floats(1e-7, 2))
def test_the_line_between_two_numbers_of_bits(kls: list[float], kl: float) -> None:
    """The share lies between those of the two that lose less and more, and is theirs at their own KL."""
    kls = sorted(kls)
    rivals = [Point(str(n), one, one, one, 1.0, 0.5 - n / 10) for n, one in enumerate(kls)]
    found = needed(kl, rivals)
    if kls[0] <= kl <= kls[-1]:
        less = [one.share for one in rivals if one.kl <= kl]
        more = [one.share for one in rivals if one.kl >= kl]
        assert found is not None
        assert max(more) - 1e-9 <= found <= max(less) + 1e-9 or min(less) - 1e-9 <= found <= max(less) + 1e-9
    else:
        assert found is None


def test_quantisation_alone_and_what_chooses_bits_and_sharing_on_it_are_searched() -> None:
    alone, whole, plan, pairs, *shared = on_planes((2, 3, 4, 6), 8)
    assert [str(alone.at(step)) for step in alone.values(64, 8)] == [
        f"topk(k=8) | bits({bits})" for bits in (2, 3, 4, 6)
    ]
    assert alone.name == "topk(k=8) | bits"
    assert str(whole.at(20)) == "depth(bytes=0.2, levels=(2, 3, 4, 6))"
    bits = [plan.at(step).policy.bits for step in plan.values(64, 8)]
    assert bits == [2 + step / 4 for step in range(17)]
    assert plan.name == "bit_plan, by lost energy"
    assert [str(pairs.at(step)) for step in pairs.values(64, 8)] == [
        f"hobbit(high={high}, low={low}, second=1.0)" for high, low in ((3, 2), (4, 2), (4, 3), (6, 3), (6, 4))
    ]
    assert [str(one.at(20)) for one in shared] == [
        f"xshare(budget=20, utility='squared') | bits({bits})" for bits in (3, 4)
    ]


def test_what_one_depth_cannot_do_is_not_searched() -> None:
    assert [one.name for one in on_planes((4,), 8)] == ["topk(k=8) | bits"]


@pytest.mark.parametrize("text", ["x", "1,-4", "0", "1;4", "99999"])
def test_batch_sizes_that_are_none(text: str) -> None:
    with pytest.raises(CarpoolError, match="--also-batch"):
        batch_sizes(text)
    assert batch_sizes("1, 4,16") == [1, 4, 16]
    assert batch_sizes("") == []
