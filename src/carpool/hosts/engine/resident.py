"""A layer's surrogates on one rank, in device memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from carpool.experts.surrogates import NAMES, SCALES, Surrogates, by_pairs, stored_part


class Resident:
    """As the file stores them.

    Attributes:
        tensors: inner, outer and, for int8, the factors of their rows.
        sum: the compiled form of `carpool.experts.surrogates.by_pairs`; None where the sum runs operation by operation.
    """

    def __init__(self, statistics: Mapping[str, Tensor], rank: int, world: int, device: torch.device) -> None:
        part = stored_part(statistics, rank, world)
        self.tensors = [part[name].to(device) for name in (*NAMES, *SCALES) if name in part]
        self.sum: Callable[..., Tensor] | None = None

    @property
    def memory(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Of one expert's surrogate."""
        return self.memory // len(self.tensors[0])

    def __call__(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The weighted sum of this rank's parts, `[N, H]` float32."""
        if self.sum is None or len(hidden_NH) == 1:  # compilers take one row for a special case
            if ids_NK.numel() < len(self.tensors[0]):  # fewer numbers to convert than all experts have
                return by_pairs(hidden_NH, ids_NK, weights_NK, *self.tensors)
            return self.whole()(hidden_NH, ids_NK, weights_NK)
        return self.sum(hidden_NH.float().contiguous(), ids_NK.contiguous(), weights_NK.contiguous(), *self.tensors)

    def whole(self) -> Surrogates:
        """All experts' surrogates in floats."""
        return Surrogates.of(dict(zip((*NAMES, *SCALES), self.tensors, strict=False)), self.tensors[0].device)
