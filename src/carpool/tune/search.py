"""The search: one number per family by bisection, then budgets per layer from each layer's sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from carpool.errors import CarpoolError
from carpool.policy_file import PolicyFile
from carpool.tune.allocate import allocations
from carpool.tune.families import Family
from carpool.tune.target import Target
from carpool.tune.trials import Point, Trials

STEPS = (0.6, 0.8, 1.25, 1.6)  # of a layer's budget, where its sensitivity is measured
REPAIRS = 4  # larger settings that verification may ask for
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
        value = _bisect(family, family.values(moe.experts, moe.top_k), target, search)
        if value is None:
            say(f"{family.plan.policy.name}: does not reach {target}")
            continue
        (point,) = search.measure([PolicyFile(family.at(value))])
        if point.share >= 1:
            say(f"{family.plan.policy.name}: reaches {target} only where it reads all that stock reads")
            continue
        say(f"{point.policy}: KL {point.kl:.4f}, reads {point.share:.1%} of stock")
        if best is None or _cost(point, target) < _cost(best[0], target):
            best = (point, family, value)
    if best is None:
        raise _infeasible(target, search)
    uniform, family, value = best
    candidates = [PolicyFile(family.at(value))]
    if per_layer and len(layers) > 1:
        candidates += _allocated(family, value, target, search, layers)
    good = [
        (point, one)
        for one, point in zip(candidates, search.measure(candidates), strict=True)
        if target.met(point.kl, point.perplexity_ratio, point.share)
    ]
    good.sort(key=lambda pair: _cost(pair[0], target))
    return _verified(good, family, value, target, search, verify, uniform)


def _bisect(family: Family, values: list[int], target: Target, search: Trials) -> int | None:
    """The value on the target's edge: the smallest that keeps the quality, or the largest that reads little enough."""
    low, high = 0, len(values) - 1
    found = None
    while low <= high:
        middle = (low + high) // 2
        (point,) = search.measure([PolicyFile(family.at(values[middle]))])
        good = target.met(point.kl, point.perplexity_ratio, point.share)
        if good:
            found = values[middle]
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
    made = allocations(
        {
            layer: {value: (0.0, 0.0)}
            | {step: (points[layer, step].kl - start.kl, points[layer, step].share - start.share) for step in steps}
            for layer in layers
        },
        keep_quality=target.bounds_quality,
    )
    return [
        PolicyFile(base.plan, {layer: {family.knob: chosen} for layer, chosen in one.items() if chosen != value})
        for one in made
    ]


def _verified(
    good: list[tuple[Point, PolicyFile]],
    family: Family,
    value: int,
    target: Target,
    search: Trials,
    verify: Trials,
    uniform: Point,
) -> Found:
    """The cheapest candidate that holds on unseen text; where none does, one number for all layers, step by step."""
    values = family.values(search.moe.experts, search.moe.top_k)
    place, step = values.index(value), 1 if target.bounds_quality else -1
    more = [values[place + step * n] for n in range(1, REPAIRS + 1) if 0 <= place + step * n < len(values)]
    closest: Found | None = None
    for candidate in [one for _, one in good[:REPAIRS]] + [PolicyFile(family.at(one)) for one in more]:
        (point,) = verify.measure([candidate])
        (searched,) = search.measure([candidate])
        found = Found(candidate, point, target.met(point.kl, point.perplexity_ratio, point.share), uniform, searched)
        if found.met:
            return found
        if closest is None or _quality(point, target) < _quality(closest.verified, target):
            closest = found
    assert closest is not None
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
