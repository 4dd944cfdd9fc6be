"""What the experts of a transformers model are called with, forward by forward.

`N` rows of a forward, `L` MoE layers, `K` experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.layers import MoELayer


class Choices:
    """The choices of the last forward; made by `watching`."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._layers = layers
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """Experts int64 and weights float32 `[N, L, K]` on the CPU of the forward that just ran, best first.

        Raises:
            CarpoolError: a layer's experts were not called exactly once with a row per token.
        """
        for layer, calls in zip(self._layers, self._seen, strict=True):
            shapes = [list(ids.shape) for ids, _ in calls]
            if shapes != [[rows, layer.top_k]]:
                raise CarpoolError(
                    f"layer {layer.index}: its experts were called with choices of shape {shapes}, not once with "
                    f"{[rows, layer.top_k]}: something bypasses or rewrites this model's routing"
                )
        ids_NLK, weights_NLK = (
            torch.stack([calls[0][place].cpu() for calls in self._seen], 1) for place in (0, 1)
        )  # fmt: skip
        for calls in self._seen:
            calls.clear()
        order_NLK = weights_NLK.float().argsort(dim=-1, descending=True, stable=True)
        return ids_NLK.long().gather(-1, order_NLK), weights_NLK.float().gather(-1, order_NLK)

    def hook(self, place: int) -> Any:
        def seen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            _, ids_NK, weights_NK = (*args, *kwargs.values())[:3]
            self._seen[place].append((ids_NK.detach(), weights_NK.detach()))

        return seen


@contextmanager
def watching(layers: Sequence[MoELayer]) -> Iterator[Choices]:
    """Sees what these layers' experts are called with while the block is open, whoever chose it."""
    choices = Choices(layers)
    handles = [
        layer.experts.register_forward_pre_hook(choices.hook(place), with_kwargs=True)
        for place, layer in enumerate(layers)
    ]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()
