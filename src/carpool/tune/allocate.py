"""Budgets per layer from what each layer costs and saves on its own.

Near one common budget the costs of layers add up to a good approximation, so the best allocation under a price of
reading is the best step of every layer by itself; the prices between them give the whole lower hull.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

Steps = Mapping[int, tuple[float, float]]  # change of KL and of the share read, by budget


def allocations(layers: Mapping[int, Steps], *, keep_quality: bool, most: int = 6) -> list[dict[int, int]]:
    """Allocations around the common budget (the step that changes nothing).

    Args:
        layers: every layer's steps.
        keep_quality: prefer allocations whose KL is foreseen not to rise; else whose share is foreseen not to rise.
        most: allocations to return.

    Returns:
        budgets by layer, the most promising first.
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
    bound, gain = (0, 1) if keep_quality else (1, 0)
    inside = sorted((one for one in found if found[one][bound] <= 0), key=lambda one: found[one][gain])
    # sums are not exact: allocations just outside the bound are worth a trial too
    outside = sorted((one for one in found if found[one][bound] > 0), key=lambda one: found[one][bound])
    return [dict(one) for one in [*inside[: most // 2], *outside[: most - most // 2]]]


def _cheapest(steps: Steps, price: float) -> int:
    """The step of a layer with the least KL plus `price` times its share."""
    return min(steps, key=lambda step: steps[step][0] + price * steps[step][1])
