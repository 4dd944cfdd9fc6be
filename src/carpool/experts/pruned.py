"""Checkpoints with fewer experts: rows of the router and whole experts are removed, nothing else changes.

`E` experts of a layer, `P` of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from carpool.errors import CarpoolError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # where configurations say `E`
CORRECTION = "e_score_correction_bias"  # of a router, which some families keep beside it


class Layer(Protocol):
    """What pruning needs to know of an MoE layer; `hosts.transformers.MoELayer` has it."""

    @property
    def index(self) -> int: ...
    @property
    def block(self) -> nn.Module: ...
    @property
    def router(self) -> nn.Module: ...
    @property
    def experts(self) -> nn.Module: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def spec(self) -> Any: ...


def require_prunable(layers: Sequence[Layer], keep: int, config: Any) -> None:
    """Raises CarpoolError for a number of experts that the model cannot be left with, or a model whose routing depends
    on more than the experts' own scores; works without weights."""
    first = layers[0]
    if len({layer.num_experts for layer in layers}) > 1:
        raise CarpoolError("the layers differ in their number of experts, and a configuration names one number for all")
    if not first.top_k <= keep < first.num_experts:
        raise CarpoolError(
            f"--keep {keep}: a token uses {first.top_k} of {first.num_experts} experts; keep {first.top_k} to "
            f"{first.num_experts - 1}"
        )
    if any(layer.spec.num_groups > 1 for layer in layers):
        raise CarpoolError(
            f"{type(first.router).__name__} chooses among groups of experts, which would not be the same groups with "
            "fewer of them; use the policy allow_list instead"
        )
    if not _counts(config, first.num_experts):
        raise CarpoolError(
            f"the configuration of {type(first.router).__name__}'s model does not say {first.num_experts} under any of "
            f"{', '.join(COUNTS)}; such models cannot be pruned yet"
        )
    for layer in layers:
        if not any(shape[0] == layer.num_experts for shape in _shapes(layer.experts)):
            raise CarpoolError(
                f"layer {layer.index}: {type(layer.experts).__name__} does not hold its experts as whole matrices one "
                "below the other; such models cannot be pruned yet"
            )


@contextmanager
def pruned(layers: Sequence[Layer], kept: Mapping[int, Tensor], config: Any) -> Iterator[None]:
    """For the length of a block the model's weights and configuration are those of a model with the kept experts only,
    so that saving it writes one; it cannot be run meanwhile, as its modules keep their own numbers.

    Args:
        kept: by layer index the experts `[P]` in the order that they are to have, the same number in every layer.
        config: of the model.
    """
    before: list[tuple[nn.Module, str, Tensor]] = []
    counts = _counts(config, layers[0].num_experts)
    (number,) = {len(kept_P) for kept_P in kept.values()}
    try:
        for layer in layers:
            for module, name, tensor, place in _tensors(layer):
                before.append((module, name, tensor))
                some = tensor.detach().index_select(place, kept[layer.index].to(tensor.device)).contiguous()
                _set(module, name, nn.Parameter(some, False) if isinstance(tensor, nn.Parameter) else some)
        for name in counts:
            setattr(config.get_text_config(), name, number)
        yield
    finally:
        for module, name, tensor in before:
            _set(module, name, tensor)
        for name in counts:
            setattr(config.get_text_config(), name, layers[0].num_experts)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]


def _tensors(layer: Layer) -> list[tuple[nn.Module, str, Tensor, int]]:
    """Tensors of a layer that have a part for every expert: where each is, and in which dimension."""
    found = []
    inside = {id(module) for part in (layer.router, layer.experts) for module in part.modules()}
    for module in layer.block.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(module) not in inside and name != CORRECTION:
                continue
            if layer.num_experts in tensor.shape[:1]:
                found.append((module, name, tensor, 0))
            elif layer.num_experts in tensor.shape[-1:]:
                found.append((module, name, tensor, tensor.dim() - 1))
    return found


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in module.parameters() if tensor.dim() == 3]


def _counts(config: Any, num_experts: int) -> list[str]:
    text = config.get_text_config()
    return [name for name in COUNTS if getattr(text, name, None) == num_experts]
