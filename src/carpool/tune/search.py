"""The search: one number per family by bisection, then budgets per layer from each layer's sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from carpool.errors import CarpoolError
from carpool.plans.policy_file import PolicyFile
from carpool.tune.allocate import allocations, between
from carpool.tune.families import Family
from carpool.tune.target import Target
from carpool.tune.trials import Point, Trials

STEPS = (0.6, 0.8, 1.25, 1.6)  # of a layer's budget, where its sensitivity is measured
LEVELS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)  # of the target: unseen text may lose more than the search's
MOST_ROOM = 1.5  # by which the sum of layers is trusted
REPAIRS = 4  # settings beyond the common one that verification may ask for
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        chosen: plan and settings per layer.
        verified: it, on text that the search did not see.
        met: whether the target holds there.
        best_uniform: on the search's text, the best with one number for all layers.
        searched: it, on the search's text.
    """

    chosen: PolicyFile
    verified: Point
    met: bool
    best_uniform: Point
    searched: Point


def tune(
    families: Sequence[Family],
    target: Target,
    search: Trials,
    verify: Trials,
    layers: Sequence[int],
    *,
    per_layer: bool = True,
    say: Say = lambda text: None,
) -> Found:
    """Find what reads least within a quality target (or costs least within a budget), and verify it.

    Args:
        families: to choose from. search, verify: measure on text of their own each.
        layers: indices of the MoE layers, ascending.
        per_layer: allocate budgets to layers; 4 trials a layer.

    Raises:
        CarpoolError: no family reaches the target; the message names the best that one does.
    """
    moe = search.moe
    best: tuple[Point, Family, int] | None = None
    for family in families:
        rival = None if best is None else best[0]
        value = _bisect(family, family.values(moe.experts, moe.top_k), target, search, rival)
        if value is None:
            missed = f"does not reach {target}" if best is None else f"no better than {best[0].policy}"
            say(f"{family.name}: {missed}")
            continue
        (point,) = search.measure([PolicyFile(family.at(value))])
        if point.share >= 1:
            say(f"{family.name}: reaches {target} only where it reads all that stock reads")
            continue
        say(f"{point.policy}: KL {point.kl:.4f}, reads {point.share:.1%} of stock")
        if best is None or _cost(point, target) < _cost(best[0], target):
            best = (point, family, value)
    if best is None:
        raise _infeasible(target, search)
    uniform, family, value = best
    values = family.values(moe.experts, moe.top_k)
    place, step = values.index(value), 1 if target.bounds_quality else -1
    repairs = [values[at] for n in range(REPAIRS + 1) if 0 <= (at := place + step * n) < len(values)]
    candidates = [PolicyFile(family.at(one)) for one in repairs]
    if per_layer and len(layers) > 1:
        candidates += _allocated(family, value, target, search, layers)
    good = [
        (point, one)
        for one, point in zip(candidates, search.measure(candidates), strict=True)
        if target.met(point.kl, point.perplexity_ratio, point.share)
    ]
    good.sort(key=lambda pair: _cost(pair[0], target))
    return _verified(good, target, verify, uniform)


def _bisect(family: Family, values: list[int], target: Target, search: Trials, best: Point | None) -> int | None:
    """The value on the target's edge: the smallest that keeps the quality, or the largest that reads little enough.

    None where no value is there, or none that beats `best`: where one that misses the target costs as much, those that
    keep it cost more.
    """
    low, high = 0, len(values) - 1
    found = None
    while low <= high:
        middle = (low + high) // 2
        (point,) = search.measure([PolicyFile(family.at(values[middle]))])
        good = target.met(point.kl, point.perplexity_ratio, point.share)
        if good:
            found = values[middle]
        elif best is not None and _cost(point, target) >= _cost(best, target):
            return None
        if good == target.bounds_quality:
            high = middle - 1
        else:
            low = middle + 1
    return found


def _allocated(family: Family, value: int, target: Target, search: Trials, layers: Sequence[int]) -> list[PolicyFile]:
    values = family.values(search.moe.experts, search.moe.top_k)
    steps = sorted({min(max(round(value * step), values[0]), values[-1]) for step in STEPS} - {value})
    steps = [step for step in steps if step in values]
    if not steps:
        return []
    base = PolicyFile(family.at(value))
    single = {(layer, step): PolicyFile(base.plan, {layer: {family.knob: step}}) for layer in layers for step in steps}
    points = dict(zip(single, search.measure(list(single.values())), strict=True))
    (start,) = search.measure([base])
    layered = {}
    for layer in layers:
        measured = {step: points[layer, step] for step in steps}
        changes = {step: (one.kl - start.kl, one.share - start.share) for step, one in measured.items()}
        layered[layer] = between(changes | {value: (0.0, 0.0)}, value, start.kl, values)
    room = min(target.room(start.kl, start.perplexity_ratio, start.share), MOST_ROOM)
    if target.bounds_quality:
        bounds = [start.kl * (room * level - 1) for level in LEVELS]
    else:  # what is read differs little from text to text
        bounds = [start.share * (room * (0.9 + 0.1 * level) - 1) for level in LEVELS]
    made = allocations(layered, bounds, keep_quality=target.bounds_quality)
    return [
        PolicyFile(base.plan, {layer: {family.knob: chosen} for layer, chosen in one.items() if chosen != value})
        for one in made
    ]


def _verified(good: list[tuple[Point, PolicyFile]], target: Target, verify: Trials, uniform: Point) -> Found:
    """The cheapest candidate that holds on unseen text; where none does, the closest."""
    closest: Found | None = None
    for searched, candidate in good:
        (point,) = verify.measure([candidate])
        found = Found(candidate, point, target.met(point.kl, point.perplexity_ratio, point.share), uniform, searched)
        if found.met:
            return found
        if closest is None or _quality(point, target) < _quality(closest.verified, target):
            closest = found
    assert closest is not None  # the common number keeps the target on the search's text
    return closest


def _cost(point: Point, target: Target) -> float:
    """What is minimised."""
    return point.share if target.bounds_quality else point.kl


def _quality(point: Point, target: Target) -> float:
    """What the target bounds."""
    if target.max_kl is not None:
        return point.kl
    return point.share if target.union is not None else point.perplexity_ratio


def _infeasible(target: Target, search: Trials) -> CarpoolError:
    saving: list[Any] = [point for point in search.points.values() if point.share < 1]
    if not saving:
        return CarpoolError(f"no policy reads less than stock here, so {target} cannot be tuned for; raise --batch")
    best = min(saving, key=lambda point: _quality(point, target))
    return CarpoolError(
        f"no policy reaches {target}: closest is {best.policy} with KL {best.kl:.2g}, perplexity x "
        f"{best.perplexity_ratio:.4f} and {best.share:.1%} of what stock reads; loosen the target"
    )
