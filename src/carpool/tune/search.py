"""The search: one number per family by bisection, then verification on text of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan
from carpool.tune.families import Family
from carpool.tune.target import Target
from carpool.tune.trials import Point, Trials

REPAIRS = 4  # values beyond the one on the target's edge that verification may ask for
Say = Callable[[str], None]


@dataclass(frozen=True)
class Failed:
    """A plan that kept the target on the search's text, and not on text that the search did not see."""

    searched: Point
    verified: Point


@dataclass(frozen=True)
class Tuned:
    """What a search chose.

    Attributes:
        plan: what reads least (or costs least within a budget) and kept the target where it was verified.
        searched: it, on the search's text.
        verified: it, on text that the search did not see.
        met: whether the target holds there; if not, no candidate kept it and this one came closest.
        failed: those that were tried before it, and failed there.
    """

    plan: Plan
    searched: Point
    verified: Point
    met: bool
    failed: tuple[Failed, ...] = ()


def tune(
    families: Sequence[Family], target: Target, search: Trials, verify: Trials, say: Say = lambda text: None
) -> Tuned:
    """Find what reads least within a quality target (or costs least within a budget), and verify it.

    Args:
        families: to choose from. search, verify: measure on text of their own each.

    Raises:
        CarpoolError: no family reaches the target; the message names the best that one does.
    """
    family, value = edge(families, target, search, say)
    values = family.values(search.moe.experts, search.moe.top_k)
    place, step = values.index(value), 1 if target.bounds_quality else -1
    repairs = [values[at] for n in range(REPAIRS + 1) if 0 <= (at := place + step * n) < len(values)]
    closest: Tuned | None = None
    failed: list[Failed] = []
    for plan in map(family.at, repairs):
        (searched,) = search.measure([plan])
        if not _met(target, searched):
            continue
        (verified,) = verify.measure([plan])
        found = Tuned(plan, searched, verified, _met(target, verified), tuple(failed))
        if found.met:
            return found
        say(f"{plan}: failed verification")
        failed.append(Failed(searched, verified))
        if closest is None or _bounded(verified, target) < _bounded(closest.verified, target):
            closest = found
    assert closest is not None  # the value on the edge keeps the target on the search's text
    return replace(closest, failed=tuple(one for one in failed if one.searched != closest.searched))


def edge(
    families: Sequence[Family], target: Target, search: Trials, say: Say = lambda text: None
) -> tuple[Family, int]:
    """The family and the value that are best on the search's text; raises as `tune` does."""
    best: tuple[Point, Family, int] | None = None
    for family in families:
        rival = None if best is None else best[0]
        value = _bisect(family, family.values(search.moe.experts, search.moe.top_k), target, search, rival)
        if value is None:
            missed = f"does not reach {target}" if best is None else f"no better than {best[0].policy}"
            say(f"{family.name}: {missed}")
            continue
        (point,) = search.measure([family.at(value)])
        if point.share >= 1:
            say(f"{family.name}: reaches {target} only where it reads all that stock reads")
            continue
        say(f"{point.policy}: KL {point.kl:.4f}, reads {point.share:.1%} of stock")
        if best is None or _cost(point, target) < _cost(best[0], target):
            best = (point, family, value)
    if best is None:
        raise _infeasible(target, search)
    return best[1:]


def _bisect(family: Family, values: list[int], target: Target, search: Trials, best: Point | None) -> int | None:
    """The value on the target's edge: the smallest that keeps the quality, or the largest that reads little enough.

    None where no value is there, or none that beats `best`: where one that misses the target costs as much, those that
    keep it cost more.
    """
    low, high = 0, len(values) - 1
    found = None
    while low <= high:
        middle = (low + high) // 2
        (point,) = search.measure([family.at(values[middle])])
        good = _met(target, point)
        if good:
            found = values[middle]
        elif best is not None and _cost(point, target) >= _cost(best, target):
            return None
        if good == target.bounds_quality:
            high = middle - 1
        else:
            low = middle + 1
    return found


def _met(target: Target, point: Point) -> bool:
    return target.met(point.kl, point.perplexity_ratio, point.share)


def _cost(point: Point, target: Target) -> float:
    """What is minimised."""
    return point.share if target.bounds_quality else point.kl


def _bounded(point: Point, target: Target) -> float:
    """What the target bounds."""
    if target.max_kl is not None:
        return point.kl
    return point.share if target.bytes is not None else point.perplexity_ratio


def _infeasible(target: Target, search: Trials) -> CarpoolError:
    saving = [point for point in search.points.values() if point.share < 1]
    if not saving:
        return CarpoolError(f"no policy reads less than stock here, so {target} cannot be tuned for; raise --batch")
    best = min(saving, key=lambda point: _bounded(point, target))
    return CarpoolError(
        f"no policy reaches {target}: closest is {best.policy} with KL {best.kl:.2g}, perplexity x "
        f"{best.perplexity_ratio:.4f} and {best.share:.1%} of what stock reads; loosen the target"
    )
