"""A placement: which device holds which experts, and how good its planner knows it to be.

`L` MoE layers, `D` devices on `M` nodes, `S` slots a device and layer, `E` experts. Slot `s` of device `d` is physical
expert `d * S + s`, as engines number them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from carpool.errors import CarpoolError


@dataclass(frozen=True, eq=False)
class Placement:
    """Where experts live; an instance is always valid.

    Attributes:
        expert_LDS: int64, the expert in every slot. An expert may have several (replicas).
        num_experts: `E`.
        nodes: `M`; devices of one node are consecutive.
        method: name of the planner.
        objective: what it made small, in words; empty for baselines.
        value: of the objective on what it was planned on.
        bound: no placement of this shape has less; None: not known.
        status: `optimal`, `heuristic`, or `baseline`.
        seed: that the placement depends on; None: on none.

    Raises:
        CarpoolError: on construction: an expert without a slot, devices that do not divide into nodes.
    """

    expert_LDS: Tensor
    num_experts: int
    nodes: int = 1
    method: str = ""
    objective: str = ""
    value: float = 0.0
    bound: float | None = None
    status: str = "baseline"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.expert_LDS.dim() != 3 or self.expert_LDS.dtype != torch.int64:
            raise CarpoolError("a placement holds int64 experts by layer, device and slot")
        if self.nodes < 1 or self.devices % self.nodes:
            raise CarpoolError(
                f"{self.devices} devices do not divide into {self.nodes} nodes: change --devices or --nodes"
            )
        odd = self.expert_LDS[(self.expert_LDS < 0) | (self.expert_LDS >= self.num_experts)]
        if odd.numel():
            raise CarpoolError(f"the placement holds expert {int(odd[0])} of {self.num_experts}")
        homeless = (~self.holds_LDE.any(1)).nonzero()
        if homeless.numel():
            layer, expert = homeless[0].tolist()
            raise CarpoolError(f"the placement has no slot for expert {expert} of layer {layer}")

    @property
    def layers(self) -> int:
        return self.expert_LDS.shape[0]

    @property
    def devices(self) -> int:
        return self.expert_LDS.shape[1]

    @property
    def slots(self) -> int:
        return self.expert_LDS.shape[2]

    @cached_property
    def holds_LDE(self) -> Tensor:
        """Bool: which device holds which expert."""
        held = torch.zeros(self.layers, self.devices, self.num_experts, dtype=torch.bool)
        return held.scatter_(2, self.expert_LDS, True)

    @property
    def replicas_LE(self) -> Tensor:
        """Int64: on how many devices each expert lies."""
        return self.holds_LDE.sum(1)

    @property
    def wasted(self) -> int:
        """Slots that hold what their device holds already."""
        return self.layers * self.devices * self.slots - int(self.holds_LDE.sum())

    @property
    def device_LE(self) -> Tensor:
        """Int64: the first device that holds each expert, which is the only one where there are no replicas."""
        return self.holds_LDE.int().argmax(1)

    def moved_from(self, other: Placement) -> int:
        """Experts' weights that devices have to get when this placement takes another's place.

        Raises:
            CarpoolError: the placements are of different shapes.
        """
        if (self.layers, self.devices, self.num_experts) != (other.layers, other.devices, other.num_experts):
            raise CarpoolError("these placements are of different models or numbers of devices")
        return int((self.holds_LDE & ~other.holds_LDE).sum())


def slots_for(num_experts: int, devices: int, nodes: int = 1, redundant: int = 0) -> int:
    """Slots `S` of every device for so many experts and redundant replicas.

    Raises:
        CarpoolError: they do not divide evenly, in one sentence with what would.
    """
    if devices < 1 or nodes < 1 or devices % nodes:
        raise CarpoolError(f"{devices} devices do not divide into {nodes} nodes: change --devices or --nodes")
    physical = num_experts + redundant
    if redundant < 0 or physical % devices:
        more = -num_experts % devices
        raise CarpoolError(
            f"{num_experts} experts and {redundant} redundant ones do not fill {devices} devices evenly: give "
            f"--redundant {more}, {more + devices}, ..., or other --devices"
        )
    if physical // devices > num_experts:
        raise CarpoolError(
            f"{physical // devices} slots on each of {devices} devices are more than there are experts "
            f"({num_experts}): lower --redundant"
        )
    return physical // devices


def from_devices(device_LE: Tensor, devices: int) -> Tensor:
    """Slots `[L, D, S]` of a placement without replicas, experts of a device in the order of their numbers.

    Args:
        device_LE: int64, the device of each expert, each of which has equally many.
    """
    layers, num_experts = device_LE.shape
    return device_LE.argsort(dim=-1, stable=True).view(layers, devices, num_experts // devices)
