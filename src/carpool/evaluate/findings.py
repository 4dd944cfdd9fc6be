"""What a comparison means, in sentences computed from its numbers; nothing where there are too few batches for that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carpool.evaluate.intervals import FEWEST, Array, interval
from carpool.evaluate.series import Curve, worse

HALF = 0.5


def findings(curves: Sequence[Curve]) -> list[str]:
    """What the best method costs at half of what stock reads, what the controls cost there, and who loses to one.

    Curves that do not span that are left out of the first two sentences. With fewer batches than an interval needs
    there is one sentence, which says so.
    """
    batches = curves[0].stock.measured.batches
    if batches < FEWEST:
        return [
            f"{batches} batches are too few to say which method is better: the scatter between batches is not known. "
            f"Decode {FEWEST} or more (--batches {FEWEST})."
        ]
    methods = [curve for curve in curves if not curve.series.control]
    controls = [curve for curve in curves if curve.series.control]
    return [*_at_half(methods, controls), _losers(methods, controls)]


def best_at(curves: Sequence[Curve], share: float) -> Curve | None:
    """The method with the lowest KL at a share of what stock reads; None if no method spans it."""
    spanning = [curve for curve in curves if not curve.series.control and curve.points.holds(share)]
    return min(spanning, key=lambda curve: curve.log_kl_at(share), default=None)


def _at_half(methods: Sequence[Curve], controls: Sequence[Curve]) -> list[str]:
    best = best_at(methods, HALF)
    if best is None:
        return [
            "No method was measured on both sides of half of what stock reads.",
            "Nothing can be said about its cost.",
        ]
    stock, at_half_K = best.stock.union.value, best.points.at(HALF)
    first = (
        f"At half of what stock reads ({HALF * stock:.1f} instead of {stock:.1f} experts in a layer and step), "
        f"{best.series.label} stays closest to the model: KL {np.exp(at_half_K[0]):.3g} nats a token, "
        f"perplexity {100 * (np.exp(best.log_ratio_at(HALF)) - 1):+.1f} %{_near(best, at_half_K, methods)}."
    )
    others = [
        f"{control.series.label} costs KL {np.exp(control.log_kl_at(HALF)):.3g} "
        f"({_times(control.points.at(HALF) - at_half_K)} as much) and "
        f"perplexity {100 * (np.exp(control.log_ratio_at(HALF)) - 1):+.1f} %"
        for control in controls
        if control.points.holds(HALF)
    ]
    if not others:
        return [first, "No control was measured on both sides of that."]
    return [first, f"At equal bytes, {'; '.join(others)}."]


def _near(best: Curve, at_half_K: Array, methods: Sequence[Curve]) -> str:
    """Methods that these batches do not tell from the best one."""
    near = []
    for one in methods:
        if one is not best and one.points.holds(HALF):
            low, _ = interval(one.points.at(HALF) - at_half_K)
            if low is None or low <= 0:
                near.append(one.series.label)
    return f" (not to be told apart from {', '.join(near)} on these batches)" if near else ""


def _times(log_ratio_K: Array) -> str:
    low, high = interval(log_ratio_K)
    between = "" if low is None or high is None else f" [{np.exp(low):.1f}, {np.exp(high):.1f}]"
    return f"{np.exp(log_ratio_K[0]):.1f}{between} times"


def _losers(methods: Sequence[Curve], controls: Sequence[Curve]) -> str:
    lost: dict[str, list[str]] = {}
    compared = 0
    for method in methods:
        for setting, result in enumerate(method.results):
            for control in controls:
                if not control.points.holds(method.share_I[setting]):
                    continue
                compared += 1
                low, _ = interval(worse(method, setting, control))
                if low is not None and low > 0:
                    lost.setdefault(control.series.label, []).append(result.measured.name)
    if not compared:
        return "No setting of a method lies where a control was measured."
    if not lost:
        return "No method loses to a control at equal bytes, at any of its settings."
    said = "; ".join(
        f"{', '.join(dict.fromkeys(names))} lose{'s' * (len(names) == 1)} to {label}" for label, names in lost.items()
    )
    return f"At equal bytes (95 % interval of the KL ratio above 1), {said}."
