"""Checkpoints whose experts are in another order: engines that place them in order follow a placement.

`L` MoE layers, `D` devices, `S` slots of each, `E` experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.experts.pruned import Layer, pruned


def require_order(layers: Sequence[Layer], expert_LDS: Tensor) -> None:
    """Raises CarpoolError for a placement that no order of experts is, or a model that other orders would change; works
    without weights."""
    num_experts = layers[0].num_experts
    if expert_LDS.shape[0] != len(layers) or any(layer.num_experts != num_experts for layer in layers):
        raise CarpoolError(f"the placement is of {expert_LDS.shape[0]} layers, the model has {len(layers)}; plan again")
    if expert_LDS[0].numel() != num_experts:
        raise CarpoolError(
            f"a checkpoint holds every expert once, the placement has {expert_LDS[0].numel()} places for "
            f"{num_experts}: plan without --redundant"
        )
    if any(layer.spec.num_groups > 1 for layer in layers):
        raise CarpoolError(
            f"{type(layers[0].router).__name__} chooses among groups of experts, which would not be the same groups in "
            "another order; give the placement to an engine instead (--format carpool or sglang)"
        )


@contextmanager
def permuted(layers: Sequence[Layer], expert_LDS: Tensor, config: Any) -> Iterator[None]:
    """For the length of a block the model's routers and experts are in the order of a placement's slots, so that
    saving it writes such a checkpoint: the same function of its input, up to the order of sums, whose expert
    `d * S + s` is the one in slot `s` of device `d`.

    Files that name experts by number (statistics, traces, policy files) are of the order that they were made with.

    Raises:
        CarpoolError: see `require_order`.
    """
    require_order(layers, expert_LDS)
    order = {layer.index: expert_DS.flatten() for layer, expert_DS in zip(layers, expert_LDS, strict=True)}
    with pruned(layers, order, config):
        yield
