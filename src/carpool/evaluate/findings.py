"""What a comparison means, in sentences computed from its numbers; nothing where there are too few batches for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carpool.evaluate.intervals import FEWEST, Array, Estimate, interval
from carpool.evaluate.series import Curve, worse

HALF = 0.5
HAIR = 0.02  # of stock's bytes: a control's first and last settings stand for what lies a hair outside of them


@dataclass(frozen=True)
class Versus:
    """A setting of a method beside a control at equal bytes: its KL over the control's."""

    policy: str
    control: str
    ratio: Estimate


def findings(curves: Sequence[Curve]) -> list[str]:
    """What the best method costs at half of what stock reads, what the controls cost there, and who loses to one.

    Curves that do not span that are left out of the first two sentences. With fewer batches than an interval needs
    there is one sentence, which says so.
    """
    batches = curves[0].stock.measured.batches
    if batches < FEWEST:
        return [
            f"Too few batches ({batches}) to say which method is better: the scatter between batches is not known. "
            f"Decode {FEWEST} or more (--batches {FEWEST})."
        ]
    methods = [curve for curve in curves if not curve.series.control]
    controls = [curve for curve in curves if curve.series.control]
    return [*_at_half(methods, controls), _losers(over_controls(curves))]


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
    found = _ratio(log_ratio_K)
    between = "" if found.low is None else f" [{found.low:.1f}, {found.high:.1f}]"
    return f"{found.value:.1f}{between} times"


def over_controls(curves: Sequence[Curve]) -> list[Versus]:
    """Every setting of every method beside every control that was measured there."""
    return [
        Versus(result.measured.name, control.series.label, _ratio(worse(method, setting, control)))
        for method in curves
        if not method.series.control
        for setting, result in enumerate(method.results)
        for control in curves
        if control.series.control and control.points.holds(method.share_I[setting], HAIR)
    ]


def _ratio(log_ratio_K: Array) -> Estimate:
    low, high = interval(log_ratio_K)
    value = float(np.exp(log_ratio_K[0]))
    return Estimate(value) if low is None or high is None else Estimate(value, float(np.exp(low)), float(np.exp(high)))


def _losers(compared: Sequence[Versus]) -> str:
    lost: dict[str, list[str]] = {}
    for one in compared:
        if one.ratio.low is not None and one.ratio.low > 1:
            lost.setdefault(one.control, []).append(one.policy)
    if not compared:
        return "No setting of a method lies where a control was measured."
    if not lost:
        return "No method loses to a control at equal bytes, at any of its settings."
    said = "; ".join(
        f"{', '.join(dict.fromkeys(names))} lose{'s' * (len(names) == 1)} to {label}" for label, names in lost.items()
    )
    return f"At equal bytes (95 % interval of the KL ratio above 1), {said}."
