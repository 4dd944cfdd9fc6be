"""Budgets per layer from what each layer costs and saves on its own.

Near one common budget the costs of layers add up to a good approximation, so the best allocation under a price of
reading is the best step of every layer by itself; the prices between them give the whole lower hull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.polynomial import Polynomial

FINE = 25  # budgets of a layer to choose from, at most
LEAST_KL = 1e-9  # nats

Steps = Mapping[int, tuple[float, float]]  # change of KL and of the share read, by budget


def between(steps: Steps, value: int, kl: float, values: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Steps between the measured ones, foreseen: log KL as a parabola in the budget, the share linear between steps.

    Args:
        steps: measured, with the step that changes nothing. value: that step. kl: with it in every layer.
        values: budgets that are allowed.
    """
    known = np.array(sorted(steps))
    kls, shares = (np.array([steps[step][which] for step in known]) for which in (0, 1))
    logs = np.log(np.maximum(kl + kls, LEAST_KL))
    parabola = Polynomial.fit(known, logs, min(2, len(known) - 1))
    inside = [one for one in values if known[0] <= one <= known[-1]]
    chosen = {inside[round(place)] for place in np.linspace(0, len(inside) - 1, min(len(inside), FINE))} | {value}
    # relative to the parabola's own value at the common budget, where it does not pass through the measurement
    return {
        step: (
            float(kl * (np.exp(parabola(step) - parabola(value)) - 1)),
            float(np.interp(step, known, shares)),
        )
        for step in sorted(chosen)
    }


def allocations(layers: Mapping[int, Steps], bounds: Sequence[float], *, keep_quality: bool) -> list[dict[int, int]]:
    """Allocations around the common budget (the step that changes nothing).

    Args:
        layers: every layer's steps.
        bounds: how much KL may rise (negative: has to fall); one allocation each, if there is one.
        keep_quality: or else, how much the share may rise.

    Returns:
        budgets by layer.
    """
    prices = sorted(
        {
            -(kl - other_kl) / (share - other_share)
            for steps in layers.values()
            for kl, share in steps.values()
            for other_kl, other_share in steps.values()
            if share != other_share and (kl - other_kl) * (share - other_share) < 0
        }
    )
    edges = [prices[0] / 2, *prices, prices[-1] * 2] if prices else []
    found: dict[tuple[tuple[int, int], ...], tuple[float, float]] = {}
    for low, high in pairwise(edges):
        price = (low + high) / 2
        chosen = {layer: _cheapest(steps, price) for layer, steps in layers.items()}
        kl, share = (sum(layers[layer][step][which] for layer, step in chosen.items()) for which in (0, 1))
        found[tuple(chosen.items())] = (kl, share)
    bounded, gained = (0, 1) if keep_quality else (1, 0)
    made = []
    for bound in bounds:
        inside = [one for one in found if found[one][bounded] <= bound + 1e-12]  # sums round
        if inside:
            made.append(min(inside, key=lambda one: found[one][gained]))
    return [dict(one) for one in dict.fromkeys(made)]


def _cheapest(steps: Steps, price: float) -> int:
    """The step of a layer with the least KL plus `price` times its share."""
    return min(steps, key=lambda step: steps[step][0] + price * steps[step][1])
