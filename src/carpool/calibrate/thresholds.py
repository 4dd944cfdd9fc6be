"""From a budget to a threshold: the search of MoDES (arXiv 2511.15690), for one threshold.

A threshold that skips experts skips more the higher it is, and costs more. Both are exact for one layer; over several
layers, skipping changes later routing and they are only nearly true, which the search checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from carpool.errors import CarpoolError


def threshold_for(skipped: Callable[[float], float], target: float, grid: Sequence[float]) -> float:
    """The lowest threshold of the grid that skips at least `target`.

    Bisection; if what it meets is not monotone, the whole grid is tried.

    Args:
        skipped: share of (token, expert) pairs skipped at a threshold; each call is a pass over the calibration text.
        target: share wanted, 0 to 1.
        grid: ascending.

    Raises:
        CarpoolError: no threshold of the grid reaches the target.
    """
    _check(target, grid)
    measured = cache(skipped)
    _check_reached(measured(grid[-1]), target)
    low, high = 0, len(grid) - 1
    met = [high]
    while low < high:
        middle = (low + high) // 2
        met.append(middle)
        low, high = (low, middle) if measured(grid[middle]) >= target else (middle + 1, high)
    values = [measured(grid[place]) for place in sorted(met)]
    if values != sorted(values):
        return next(threshold for threshold in grid if measured(threshold) >= target)
    return grid[high]


def _check(target: float, grid: Sequence[float]) -> None:
    if not 0 <= target <= 1:
        raise CarpoolError(f"target={target!r}: give a share of the pairs, 0 to 1")
    if not grid or list(grid) != sorted(grid):
        raise CarpoolError("the grid of thresholds must be ascending and not empty")


def _check_reached(most: float, target: float) -> None:
    if most < target:
        raise CarpoolError(f"the highest threshold skips {most:.3f} of the pairs, not {target:.3f}; widen the grid")
