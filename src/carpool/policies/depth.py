"""Depth: read each expert of a batch with as many bits as the batch needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.depth_prices import deep_outliers, increments, prices
from carpool.policies.parameters import Number, require, resolve_budget
from carpool.policies.registry import register
from carpool.routing.exact import FRACTION_BITS
from carpool.routing.keys import tie_order
from carpool.routing.spec import ALL_BITS

A_HAIR = 1e-9  # sums of bytes are not exact


@register
@dataclass(frozen=True)
class Depth(Policy):
    """Read every expert at the depth where one more bit costs more bytes than the batch would lose without it.

    Carpool's own method. Experts are stored as planes of bits (`carpool compress`) and may be read at several depths.
    What a group loses of its output where expert `e` is read with `b` bits is about `u_e * d_e(b)`: `u_e`, the sum over
    the voters that natively pick it of the squared share of their weight, times the expert's mean energy; `d_e(b)`, the
    share of that energy which `b` bits leave unexplained, 1 where it is not read at all. The depths that minimise

        sum_e u_e d_e(b_e) + price * sum_e bytes(b_e)

    are found for each expert alone. Pairs of experts that are not read are filled up from the others, as in BASE, of
    which this is the general form: BASE has the levels {0, all}.

    Unlike all that shares experts it saves bytes for a single row, too: `min_batch` leaves it alone.

    Parameters:
        bytes: mean bytes that a layer and step reads, as a share of what stock reads in 16 bits, scales included; a
            float in (0, 1). The prices that lead there are found from the calibration text, one for each power of two
            of the number of voters. 0.15 to 0.35 is the useful range.
        price: instead of `bytes`, the price itself: lost energy a byte, in units of the layer's largest energy and of
            an expert's bytes in 16 bits.
        budget: instead of `bytes`, a hard limit in every group and step, in experts of 16 bits (a float is a share of
            `E`): what saves most for its bytes is read first.
        levels: depths that may be chosen, 0 for not reading and 16 for the expert as the model holds it; default: 0 and
            all that are stored in planes.
        energy: `expert` (each expert's own mean energy) or `equal`.

    Statistics: `planes_shape` with the stored depths; `depth_bytes [L]`, what reading at a depth takes over 16 bits;
    `depth_energy [E]`, mean squared length of an expert's output; `depth_error [L, E]`, the share of it that a depth
    leaves; `depth_use [V, S, E]`, for `2**v` voters and `S` sampled batches the sum of squared shares of weight; where
    the file has it, `depth_super [E]`, super experts (arXiv 2507.23279): who uses one reads it at the deepest level.

    Example: `depth(bytes=0.22)`.

    Identity: `price=0, levels=[0, 16]`; at a price of 0 everything is read at the deepest level.
    """

    bytes: float | None = None
    price: float | None = None
    budget: int | float | None = None
    levels: tuple[int, ...] | None = None
    energy: Literal["expert", "equal"] = "expert"

    name = "depth"
    paper = "Carpool's own: bit planes read as deep as the batch needs"
    needs = ("planes_shape", "depth_bytes", "depth_energy", "depth_error", "depth_use")
    alone = True
    reads_depths = True

    def __post_init__(self) -> None:
        given = [one for one in (self.bytes, self.price, self.budget) if one is not None]
        require(len(given) == 1, "depth: give one of bytes=0.25 (a share of 16 bits), price and budget")
        good = self.bytes is None or (type(self.bytes) is float and 0 < self.bytes < 1)
        require(good, f"bytes={self.bytes!r}: give the mean share of stock's bytes to read, a float in (0, 1)")
        good = self.price is None or (type(self.price) in (int, float) and self.price >= 0)
        require(good, f"price={self.price!r}: give lost energy a byte, 0 or more")
        require(self.energy in ("expert", "equal"), f"energy={self.energy!r}: use 'expert' or 'equal'")
        if self.levels is not None:
            good = isinstance(self.levels, list | tuple) and all(type(one) is int for one in self.levels)
            good = good and len(self.levels) > 1 and list(self.levels) == sorted(set(self.levels))
            require(good, f"levels={self.levels!r}: give two or more depths in ascending order, such as [0, 2, 4]")
            object.__setattr__(self, "levels", tuple(self.levels))

    def check(self, num_experts: int, top_k: int) -> None:
        if self.budget is not None:
            resolve_budget("budget", self.budget, num_experts)

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`level [J]`, the depths, deepest first; `error [E, J]`, their lost energy a unit of use, relative to the
        largest energy; `cost [X, J]`, what they cost at the price for 0, 1, ... voters; `deepest []`, `shallowest []`;
        for a budget `gain [E, J]` and `added [E, J]` (`carpool.policies.depth_prices.increments`), experts in the order
        that breaks ties.

        Raises:
            CarpoolError: a level that is not stored, or bytes that no price leads to.
        """
        stored = stats["planes_shape"][3:].tolist()
        levels = list(self.levels or (0, *stored))
        unknown = [one for one in levels if one not in (0, *stored, ALL_BITS)]
        require(not unknown, f"levels={levels}: {unknown[:1]} is not stored; use 0, {stored} and {ALL_BITS}")
        energy_E = stats["depth_energy"].double()
        if self.energy == "equal":
            energy_E = torch.ones_like(energy_E)
        energy_E = energy_E / energy_E.amax().clamp_min(1e-30)
        error_LE, size_L = stats["depth_error"].double(), stats["depth_bytes"].double()
        share, size = (
            {0: none, **dict(zip(stored, each, strict=True)), ALL_BITS: whole}
            for none, each, whole in (
                (torch.ones_like(error_LE[0]), error_LE, torch.zeros_like(error_LE[0])),
                (size_L.new_zeros(()), size_L, size_L.new_ones(())),
            )
        )
        levels = sorted(levels, reverse=True)  # of two that cost the same the deeper one
        share_JE, size_J = (torch.stack([of[one] for one in levels]) for of in (share, size))
        level_J = torch.tensor(levels, dtype=torch.int64, device=energy_E.device)
        error_EJ = deep_outliers((share_JE * energy_E).T.contiguous(), level_J, stats)
        common = {"level": level_J, "deepest": level_J[0], "shallowest": level_J[level_J > 0][-1]}
        if self.budget is not None:
            gain_EJ, added_EJ = increments(error_EJ, size_J)
            return common | {"gain": gain_EJ, "added": added_EJ}
        use_VSE = stats["depth_use"].double()
        if self.bytes is None:
            price_V = torch.full_like(use_VSE[:, 0, 0], self.price or 0.0)
        else:
            price_V = prices(self.bytes, use_VSE, error_EJ, size_J)
        octave_X = torch.arange(1, 1 << len(price_V), device=error_EJ.device).log2().floor().long()
        cost_XJ = price_V[octave_X].unsqueeze(-1) * size_J
        return (
            common
            | {
                "error": error_EJ / (1 << FRACTION_BITS),  # of a unit of fixed-point use
                "cost": torch.cat([cost_XJ[:1], cost_XJ]),
            }
        )

    def read_depth(self, inputs: Inputs) -> Tensor:
        """Int64 `[G, E]`."""
        stats, use_GE = inputs.stats, inputs.utility(inputs.native_share_NE.square()).double()
        if self.budget is not None:
            return self._within(inputs, use_GE, resolve_budget("budget", self.budget, inputs.num_experts))
        cost_GJ = stats["cost"][inputs.voters_G1.squeeze(-1).clamp_max(len(stats["cost"]) - 1)]
        level_GE = stats["level"][(use_GE.unsqueeze(-1) * stats["error"] + cost_GJ.unsqueeze(1)).argmin(-1)]
        # a row needs an expert, whatever the price
        best_GE = use_GE == use_GE.amax(-1, keepdim=True)
        return torch.where(best_GE, level_GE.clamp_min(stats["shallowest"]), level_GE)

    @staticmethod
    def _within(inputs: Inputs, use_GE: Tensor, budget: Number) -> Tensor:
        """The levels `[G, E]` that save most within a budget of bytes."""
        stats = inputs.stats
        tied_E = tie_order(inputs.num_experts, use_GE.device).argsort(descending=True)
        gain_EJ, added_EJ = (stats[name][tied_E].flip(-1) for name in ("gain", "added"))  # shallow levels come first
        value_GEJ = torch.where(gain_EJ < 0, -1.0, use_GE[:, tied_E].unsqueeze(-1) * gain_EJ)
        first = value_GEJ.flatten(1).sort(dim=-1, descending=True, stable=True)
        added_GX = added_EJ.flatten()[first.indices]
        taken_GX = (added_GX.cumsum(-1) <= budget + A_HAIR) & (first.values >= 0)
        taken_GEJ = torch.zeros_like(taken_GX).scatter(-1, first.indices, taken_GX).unflatten(-1, gain_EJ.shape)
        level_GE = torch.where(taken_GEJ, stats["level"].flip(-1), stats["level"][-1]).amax(-1)
        return torch.zeros_like(level_GE).scatter(-1, tied_E.expand_as(level_GE), level_GE)
