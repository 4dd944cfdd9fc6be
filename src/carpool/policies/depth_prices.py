"""What bits of experts are worth: the price that leads to a mean number of bytes, and the increments worth their bytes.

Shapes: `E` experts, `J` levels, `V` powers of two of the number of voters, `S` sampled batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from carpool.policies.parameters import require

STEPS = 48  # of the bisection for a price: it is exact to 1e-9 of its range
RANGE = (-40.0, 20.0)  # log2 of the prices that are tried
DEAR = 1e9  # lost energy of a super expert that is read shallow, in units of the layer's largest energy


def prices(wanted: float, use_VSE: Tensor, error_EJ: Tensor, size_J: Tensor) -> Tensor:
    """The price for each number of voters at which the sampled batches read so much on average, `[V]`.

    As when it decides, the expert of a batch that is used most is read, whatever the price.

    Raises:
        CarpoolError: not even the deepest level takes so much, or the shallowest takes more.
    """
    lost_VSEJ = use_VSE.unsqueeze(-1) * error_EJ
    natural_VS = (use_VSE > 0).sum(-1).clamp_min(1)
    best_VSE = use_VSE == use_VSE.amax(-1, keepdim=True)
    shallowest = size_J[size_J > 0].min()

    def share(price_V: Tensor) -> Tensor:
        size_VSE = size_J[(lost_VSEJ + price_V[:, None, None, None] * size_J).argmin(-1)]
        size_VSE = torch.where(best_VSE, size_VSE.clamp_min(shallowest), size_VSE)
        read_VS = torch.where(use_VSE > 0, size_VSE, 0).sum(-1)
        return (read_VS / natural_VS).mean(-1)

    low_V, high_V = (torch.full_like(use_VSE[:, 0, 0], end) for end in RANGE)
    most, least = float(share(torch.exp2(low_V)).min()), float(share(torch.exp2(high_V)).max())
    require(
        least <= wanted <= most,
        f"bytes={wanted}: these levels read {least:.3f} to {most:.3f} of stock's bytes; ask for something between, or "
        "store the experts deeper",
    )
    for _ in range(STEPS):
        middle_V = (low_V + high_V) / 2
        more_V = share(torch.exp2(middle_V)) > wanted
        low_V, high_V = torch.where(more_V, middle_V, low_V), torch.where(more_V, high_V, middle_V)
    return torch.exp2(high_V)


def increments(error_EJ: Tensor, size_J: Tensor) -> tuple[Tensor, Tensor]:
    """What each level saves over the level before it that is worth reading: lost energy a byte `[E, J]`, falling from
    the shallowest level on, and the bytes it adds `[E, J]`; -1 and 0 for levels that are never best (above the lower
    hull of bytes and error) and for the first.

    Args:
        error_EJ: lost energy a unit of use. size_J: bytes; both of the deepest level first.
    """
    gain_EJ, added_EJ = torch.full_like(error_EJ, -1.0), torch.zeros_like(error_EJ)
    errors, sizes = error_EJ.tolist(), size_J.tolist()
    for expert, error_J in enumerate(errors):
        hull = [len(sizes) - 1]
        for level in range(len(sizes) - 2, -1, -1):

            def slope(one: int, other: int, error_J: list[float] = error_J) -> float:
                return (error_J[one] - error_J[other]) / (sizes[other] - sizes[one])

            if error_J[level] > error_J[hull[-1]]:
                continue
            while len(hull) > 1 and slope(hull[-1], level) >= slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(level)
        for before, after in pairwise(hull):
            gain_EJ[expert, after] = (error_J[before] - error_J[after]) / (sizes[after] - sizes[before])
            added_EJ[expert, after] = sizes[after] - sizes[before]
    return gain_EJ, added_EJ


def deep_outliers(error_EJ: Tensor, level_J: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
    """The lost energies with those of super experts (`depth_super [E]`, where the statistics have it) so large at all
    but the deepest level that no price and no budget makes them shallow while somebody uses them."""
    if "depth_super" not in stats:
        return error_EJ
    shallow_EJ = (stats["depth_super"] != 0).unsqueeze(-1) & (level_J < level_J.amax())
    return torch.where(shallow_EJ, DEAR, error_EJ)
