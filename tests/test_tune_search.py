"""What a search chooses from given measurements: what is verified, what comes next, and what is fallen back on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from carpool.errors import CarpoolError
from carpool.evaluate.loop import MoE
from carpool.plans.grammar import Plan
from carpool.tune import Point, Target, Tuned, family, tune

EXPERTS = 32


class Measured:
    """In place of `Trials`: KL by budget, and a share that grows with the budget."""

    def __init__(self, kl: Callable[[int], float], share: Callable[[int], float] = lambda n: n / EXPERTS) -> None:
        self.moe, self.points, self.kl, self.share = MoE(2, EXPERTS, 4), {}, kl, share
        self.asked: list[int] = []

    def measure(self, plans: Sequence[Plan]) -> list[Point]:
        found = []
        for one in plans:
            budget: Any = one.policy.budget  # type: ignore[attr-defined]
            self.asked.append(budget)
            kl = self.kl(budget)
            found.append(Point(str(one), kl, 0.9 * kl, 1.1 * kl, 1 + kl, self.share(budget)))
        self.points |= {point.policy: point for point in found}  # type: ignore[attr-defined]
        return found


def chosen(target: Target, search: Measured, verify: Measured) -> Tuned:
    return tune([family("xshare")], target, search, verify)  # type: ignore[arg-type]


def test_what_keeps_the_target_on_both_texts_is_taken() -> None:
    search, verify = Measured(lambda n: 1 / n), Measured(lambda n: 1 / n)
    found = chosen(Target(max_kl=0.1), search, verify)
    assert (str(found.plan), found.met, verify.asked) == ("xshare(budget=10)", True, [10])
    assert found.searched == found.verified == search.points["xshare(budget=10)"]  # type: ignore[index]


def test_what_misses_on_unseen_text_is_not_taken() -> None:
    """Unseen text loses more, so verification goes on to larger budgets, one after the other, until one keeps it."""
    verify = Measured(lambda n: 1.2 / n)
    found = chosen(Target(max_kl=0.1), Measured(lambda n: 1 / n), verify)
    assert (str(found.plan), found.met, verify.asked) == ("xshare(budget=12)", True, [10, 11, 12])
    assert found.verified.kl == pytest.approx(0.1)
    assert found.searched.kl == pytest.approx(1 / 12)
    ratio = chosen(Target(max_perplexity_ratio=1.1), Measured(lambda n: 1 / n), Measured(lambda n: 1.15 / n))
    assert (str(ratio.plan), ratio.met) == ("xshare(budget=12)", True)


def test_under_a_bound_on_bytes_verification_goes_on_to_smaller_budgets() -> None:
    verify = Measured(lambda n: 1 / n, lambda n: n / EXPERTS + 0.05)
    found = chosen(Target(bytes=0.5), Measured(lambda n: 1 / n), verify)
    assert (str(found.plan), found.met, verify.asked) == ("xshare(budget=14)", True, [16, 15, 14])


def test_where_nothing_keeps_the_target_the_closest_is_taken_and_said_to_miss_it() -> None:
    """The closest on unseen text, which is neither the first nor the last that was tried."""
    kls = {10: 0.5, 11: 0.4, 12: 0.2, 13: 0.3, 14: 0.35}
    verify = Measured(lambda n: kls[n])
    found = chosen(Target(max_kl=0.1), Measured(lambda n: 1 / n), verify)
    assert (str(found.plan), found.met, found.verified.kl) == ("xshare(budget=12)", False, 0.2)
    assert verify.asked == [10, 11, 12, 13, 14]
    shares = Measured(lambda n: 1 / n, lambda n: {16: 0.9, 15: 0.8, 14: 0.85, 13: 0.6, 12: 0.7}[n])
    assert str(chosen(Target(bytes=0.5), Measured(lambda n: 1 / n), shares).plan) == "xshare(budget=13)"


def test_what_misses_on_the_searched_text_is_no_candidate() -> None:
    """A number's effect need not be monotone."""
    kls = {**{n: 1 / n for n in range(1, EXPERTS + 1)}, 11: 0.3}
    verify = Measured(lambda n: {10: 0.2, 11: 0.0, 12: 0.05}[n])
    found = chosen(Target(max_kl=0.1), Measured(lambda n: kls[n]), verify)
    assert (str(found.plan), verify.asked) == ("xshare(budget=12)", [10, 12])


def test_a_target_out_of_reach_names_the_closest() -> None:
    with pytest.raises(CarpoolError, match=r"no policy reaches .* closest is xshare\(budget=31\) with KL 1,"):
        chosen(Target(max_kl=0.01), Measured(lambda n: 1 + 1 / n), Measured(lambda n: 0.0))
    with pytest.raises(CarpoolError, match=r"no policy reads less than stock here"):
        chosen(Target(max_kl=0.01), Measured(lambda n: 1.0, lambda n: 1.0), Measured(lambda n: 0.0))
