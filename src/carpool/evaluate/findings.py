"""Three sentences that say what a comparison means, computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carpool.evaluate.intervals import interval
from carpool.evaluate.series import Curve, worse_draws

HALF = 0.5


def findings(curves: Sequence[Curve]) -> list[str]:
    """What the best method costs at half of what stock reads, what the controls cost there, and who loses to one.

    Curves that do not span that are left out of the first two sentences.
    """
    methods = [curve for curve in curves if not curve.series.control]
    controls = [curve for curve in curves if curve.series.control]
    return [*_at_half(methods, controls), _losers(methods, controls)]


def best_at(curves: Sequence[Curve], share: float) -> Curve | None:
    """The method with the lowest KL at a share of what stock reads; None if no method spans it."""
    spanning = [curve for curve in curves if not curve.series.control and curve.holds(share)]
    return min(spanning, key=lambda curve: curve.log_kl_at(share), default=None)


def _at_half(methods: Sequence[Curve], controls: Sequence[Curve]) -> list[str]:
    best = best_at(methods, HALF)
    if best is None:
        return [
            "No method was measured on both sides of half of what stock reads.",
            "Nothing can be said about its cost.",
        ]
    stock = best.stock.union.value
    kl = np.exp(best.log_kl_at(HALF))
    first = (
        f"At half of what stock reads ({HALF * stock:.1f} instead of {stock:.1f} experts in a layer and step), "
        f"{best.series.label} stays closest to the model: KL {kl:.3g} nats a token, "
        f"perplexity {100 * (np.exp(best.log_ratio_at(HALF)) - 1):+.1f} %."
    )
    others = [
        f"{control.series.label} costs KL {np.exp(control.log_kl_at(HALF)):.3g} "
        f"({np.exp(control.log_kl_at(HALF)) / kl:.1f} times as much) and "
        f"perplexity {100 * (np.exp(control.log_ratio_at(HALF)) - 1):+.1f} %"
        for control in controls
        if control.holds(HALF)
    ]
    if not others:
        return [first, "No control was measured on both sides of that."]
    return [first, f"At equal bytes, {'; '.join(others)}."]


def _losers(methods: Sequence[Curve], controls: Sequence[Curve]) -> str:
    lost: dict[str, list[str]] = {}
    compared = 0
    for method in methods:
        for setting, result in enumerate(method.results):
            for control in controls:
                if not control.holds(method.share_I[setting]):
                    continue
                compared += 1
                low, _ = interval(worse_draws(method, setting, control))
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
