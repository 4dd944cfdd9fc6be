"""What the experts made of a row, kept for later forwards: such a row does not go through them again.

Shapes: `A` rows of a block of `L` positions, `F` branches of some of them in a forward, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError


class Outputs:
    """The outputs of every MoE block for the rows of one block of text.

    Rows are left out before the router, so they neither vote nor read an expert; `Batch.take` makes the batch of the
    others.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, Tensor]] = {}  # by layer and row, `[L, H]`
        self._latest: list[Tensor] = []  # by layer, `[F, L, H]`

    def clear(self) -> None:
        """Forget everything: another block begins."""
        self._kept, self._latest = {}, []

    def keep(self, rows: Sequence[int], chosen_R: Tensor) -> None:
        """From the last forward, keep the outputs of one branch of each row."""
        for layer, latest_FLH in enumerate(self._latest):
            kept = self._kept.setdefault(layer, {})
            kept.update({row: latest_FLH[branch] for row, branch in zip(rows, chosen_R.tolist(), strict=True)})
        self._latest = []

    @contextmanager
    def reused(self, model: nn.Module, rows: Sequence[int], rests_FL: Tensor) -> Iterator[None]:
        """For one forward over `F` branches of `rows`: positions that rest get what was kept of them.

        Raises:
            CarpoolError: MoE blocks that are more than router and experts, or return more than one tensor.
        """
        from carpool.hosts.transformers import find_layers

        self._latest = []
        index_N = (~rests_FL).flatten().nonzero().flatten()
        with ExitStack() as stack:
            for place, layer in enumerate(find_layers(model)):
                if layer.name.rsplit(".", 1)[-1].isdigit():
                    raise CarpoolError(
                        f"{layer.name}: router and experts are in no block of their own, whose output could be kept; "
                        "decode without reuse"
                    )
                around = _Around(layer.name, self._stored(place, rows), rests_FL.shape, index_N, self._latest)
                stack.callback(layer.block.register_forward_pre_hook(around.before).remove)
                stack.callback(layer.block.register_forward_hook(around.after).remove)
            yield

    def _stored(self, place: int, rows: Sequence[int]) -> Tensor | None:
        """What is kept of the rows in a layer, `[F, L, H]`; None before the first forward of a block."""
        kept = self._kept.get(place, {})
        return torch.stack([kept[row] for row in rows]) if kept else None


class _Around:
    """Around one MoE block: takes the rows that are computed out of its input, and puts its output among the others."""

    def __init__(
        self, name: str, stored_FLH: Tensor | None, shape: torch.Size, index_N: Tensor, latest: list[Tensor]
    ) -> None:
        self.name, self.stored_FLH, self.shape, self.index_N, self.latest = name, stored_FLH, shape, index_N, latest

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_FLH = args[0]
        return (hidden_FLH.flatten(0, 1)[self.index_N].unsqueeze(0), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.shape[:2] != (1, len(self.index_N)):
            raise CarpoolError(f"{self.name} does not return one tensor a row; decode without reuse")
        if self.stored_FLH is None:
            whole_NH = torch.zeros(self.shape.numel(), output.shape[-1], dtype=output.dtype, device=output.device)
        else:
            whole_NH = self.stored_FLH.flatten(0, 1).clone()
        whole_NH[self.index_N] = output[0]
        self.latest.append(whole_NH.unflatten(0, self.shape))
        return self.latest[-1]
