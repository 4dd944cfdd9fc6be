"""A memory of fixed size for experts, as the simulator has it: who is held, how deep, and who leaves.

Shapes: `L` MoE layers, `E` experts, `J` depths from "not held" to the deepest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carpool.offloading.rules import History, Rule

Scope = Literal["layer", "model"]
WHOLE = (0.0, 1.0)  # sizes where an expert is read as one piece


@dataclass
class Cache:
    """Experts in memory.

    Attributes:
        rule: who leaves. capacity: of a layer or of the model (`scope`), in experts of the deepest level.
        size_J: what an expert takes at each level, 0 first; the deepest is 1.
        level_LE: where each expert is held, 0 is not at all.
    """

    rule: Rule
    capacity: float
    scope: Scope
    size_J: Tensor
    history: History
    level_LE: Tensor

    @classmethod
    def of(
        cls,
        rule: Rule,
        capacity: float,
        layers: int,
        experts: int,
        scope: Scope = "layer",
        sizes: tuple[float, ...] = WHOLE,
    ) -> Cache:
        """An empty one."""
        level_LE = torch.zeros(layers, experts, dtype=torch.int64)
        return cls(rule, capacity, scope, torch.tensor(sizes).double(), History(layers, experts), level_LE)

    def use(self, step: int, layer: int, wanted_E: Tensor) -> Tensor:
        """A layer uses experts at levels (0: not); returns what had to be read of each, float64 `[E]`.

        An expert that is held shallower than wanted is deepened; one that is held deeper stays so.
        """
        self.history.observe(step, layer, wanted_E > 0, wanted_E == len(self.size_J) - 1)
        level_E = self.level_LE[layer]
        deeper_E = torch.maximum(level_E, wanted_E)
        read_E = self.size_J[deeper_E] - self.size_J[level_E]
        self.level_LE[layer] = deeper_E
        self.shrink(layer, wanted_E > 0)
        return read_E

    def add(self, layer: int, expert: int, protected_LE: Tensor) -> None:
        """Hold an expert at the deepest level that nobody has asked for yet."""
        self.level_LE[layer, expert] = len(self.size_J) - 1
        self._drop(protected_LE, slice(layer, layer + 1) if self.scope == "layer" else slice(None))

    def shrink(self, layer: int, needed_E: Tensor) -> None:
        """Let experts leave until the rest fits; those that the layer needs are the last to go."""
        protected_LE = torch.zeros_like(self.level_LE, dtype=torch.bool)
        protected_LE[layer] = needed_E
        self._drop(protected_LE, slice(layer, layer + 1) if self.scope == "layer" else slice(None))

    def _drop(self, protected_LE: Tensor, rows: slice) -> None:
        size_X = self.size_J[self.level_LE[rows]].flatten()
        if float(size_X.sum()) <= self.capacity + A_HAIR:
            return
        rank_X = self.rule.rank(self.history)[rows].flatten()
        # the protected first, then by rank; of equals the earlier expert stays
        order_X = rank_X.sort(descending=True, stable=True).indices
        first_X = protected_LE[rows].flatten()[order_X]
        order_X = torch.cat([order_X[first_X], order_X[~first_X]])
        stays_X = size_X[order_X].cumsum(0) <= self.capacity + A_HAIR
        left_X = order_X[~stays_X]
        level_X = self.level_LE[rows].flatten()
        level_X[left_X] = 0
        self.level_LE[rows] = level_X.reshape(self.level_LE[rows].shape)


A_HAIR = 1e-9  # sums of sizes are not exact
