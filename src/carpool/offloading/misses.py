"""How deep an expert is read that is not in memory: as the rows that want it deserve.

Shapes: `N` rows, `K` experts a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.artefacts.calls import read_calls
from carpool.errors import CarpoolError
from carpool.offloading.accesses import above, shares

FORMS = '"exact", "depth(3)", "depth([6, 3], [0.5])" or one of these with " | floor(0.3)"'


@dataclass(frozen=True)
class Misses:
    """What a miss reads.

    Attributes:
        depths: bits, descending; none: all that is stored. A pair is read at the first whose share it does not exceed;
            at 0 it is left out, unless its expert is there.
        shares: of the row's weight that heavier experts have, ascending, one for each depth but the last (HOBBIT's
            rule, arXiv 2411.01433).
        tau: at most this share of a row's weight is read at fewer bits than are stored; the heaviest experts are read
            whole until that holds.
    """

    depths: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    tau: float = 1.0

    @property
    def exact(self) -> bool:
        return not self.depths

    @classmethod
    def parse(cls, text: str) -> Misses:
        """From text, such as `"depth(3) | floor(0.3)"`.

        Raises:
            CarpoolError: it cannot be read, or says what cannot be.
        """
        try:
            (name, given, named), *guards = read_calls(text, "on_miss")
        except CarpoolError:
            raise CarpoolError(f"on_miss={text!r}: give {FORMS}") from None
        tau = 1.0
        if guards:
            guard, bound, more = guards[0]
            if len(guards) > 1 or guard != "floor" or more or [type(one) in (int, float) for one in bound] != [True]:
                raise CarpoolError(f"on_miss={text!r}: give {FORMS}")
            tau = float(bound[0])
        if name == "exact" and not given and not named:
            found = cls(tau=tau)
        else:
            if name != "depth" or named or not 1 <= len(given) <= 2:
                raise CarpoolError(f"on_miss={text!r}: give {FORMS}")
            depths, bounds = given[0], given[1] if len(given) == 2 else []
            depths = depths if isinstance(depths, list) else [depths]
            good = all(type(one) is int and one >= 0 for one in depths) and isinstance(bounds, list)
            good = good and depths[:1] not in ([], [0])
            good = good and all(type(one) in (int, float) and 0 <= one <= 1 for one in bounds)
            if not good or len(bounds) != len(depths) - 1 or sorted(set(depths), reverse=True) != depths:
                raise CarpoolError(
                    f"on_miss={text!r}: give depths in descending order, and a share of the row's weight between two"
                )
            if sorted(bounds) != bounds:
                raise CarpoolError(f"on_miss={text!r}: give the shares of the row's weight in ascending order")
            found = cls(tuple(depths), tuple(map(float, bounds)), tau)
        if not 0 <= tau <= 1:
            raise CarpoolError(f"on_miss={text!r}: floor takes a share of the row's weight, 0 to 1")
        return found

    @property
    def shallowest(self) -> int:
        """Bits of the least that is read; 0 where that is all that is stored."""
        return next((depth for depth in reversed(self.depths) if depth), 0)

    def check(self, offered: tuple[int, ...]) -> None:
        """Raises CarpoolError for depths that are not stored."""
        unknown = [depth for depth in self.depths if depth not in (0, *offered)]
        if unknown:
            raise CarpoolError(f"on_miss: the experts are stored at {list(offered)} bits, not at {unknown[0]}")

    def wanted(self, weights_NK: Tensor, held_NK: Tensor, most_NK: Tensor) -> Tensor:
        """Bits at which each pair is wanted, int64 `[N, K]`, 0 for pairs of weight 0.

        Args:
            held_NK: bits of each pair's expert that are in memory. most_NK: bits to read if it were the only one: all
                that is stored, or what a policy says.
        """
        live_NK = weights_NK != 0
        if self.exact:
            return torch.where(live_NK, most_NK, 0)
        share_NK = shares(weights_NK.abs(), live_NK)
        bounds = share_NK.new_tensor(self.shares)
        depth_NK = most_NK.new_tensor(self.depths)[torch.bucketize(above(share_NK), bounds)].minimum(most_NK)
        depth_NK = torch.maximum(depth_NK, held_NK.minimum(most_NK))
        if self.tau == 1:
            return torch.where(live_NK, depth_NK, 0)
        # the heaviest of those that would be shallow are read whole until what is left may be
        shallow_NK = share_NK * (live_NK & (depth_NK < most_NK))
        left_NK = shallow_NK.sum(-1, keepdim=True) - above(shallow_NK)  # before this pair is read whole
        whole_NK = (shallow_NK > 0) & (left_NK > self.tau)
        return torch.where(live_NK, torch.where(whole_NK, most_NK, depth_NK), 0)
