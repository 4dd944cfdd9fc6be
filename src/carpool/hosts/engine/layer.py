"""What the plugin knows of an engine's MoE layers while it runs: one `Layer` each, and the `Step` that all share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.statistics import Statistics
from carpool.errors import CarpoolError
from carpool.hosts.engine.knobs import Knobs
from carpool.hosts.engine.resident import Resident
from carpool.hosts.engine.step_rows import Rows
from carpool.plans.counters import Counters
from carpool.plans.grammar import Plan
from carpool.routing.spec import ALL_BITS, RouteSpec

Graph = Any  # a compiled function, to a tuple


@dataclass(eq=False)
class Step:
    """What all layers of an engine share while it runs.

    Attributes:
        rows: who the rows of the running forward pass are.
        counters: per-layer totals on the device.
        enabled: False switches every policy off.
        graphs: the engine records CUDA graphs, so that every call must run the same operations.
        observer: called with layer, logits and outcome of every routed call; None outside of tests and captures.
    """

    rows: Rows
    counters: Counters
    graphs: bool
    enabled: bool = True
    observer: Any = None


@dataclass(eq=False)
class Layer:
    """One MoE layer of one engine.

    Attributes:
        name: vLLM's name of the layer. index: its number in that name. position: its row in the counters.
        router: vLLM's router object. spec: how it routes. num_experts, hidden_size: `E` and `H`.
        runner: vLLM's object that runs router and experts.
        plan: policy and guards. source: the statistics file; statistics: its tensors of this layer; stats: what the
            policy made of them.
        knobs: the plan's numbers as device tensors.
        graph: the compiled form of this plan's kind; None where there is none.
        fused: the launches of this plan (`carpool.kernels.launch.Fused`); None where there are none.
        resident: surrogates on the device, once a plan has asked for them.
        depth_NK: where a checkpoint in planes is told how deep to read, see `planes.new_buffer`; None elsewhere.
        left: expert ids and weights of the pairs that the last call left to surrogates, until the experts run.
    """

    name: str
    index: int
    router: Any
    spec: RouteSpec
    plan: Plan
    num_experts: int
    hidden_size: int
    device: torch.device
    position: int = 0
    source: Statistics | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    knobs: Knobs | None = None
    graph: Graph | None = None
    fused: Any = None
    step: Step | None = None
    runner: Any = None
    resident: Resident | None = None
    depth_NK: Tensor | None = None
    left: tuple[Tensor, Tensor] | None = None

    def require_added(self) -> None:
        """Raises CarpoolError if pairs were left to surrogates and the experts ran without them."""
        if self.left is not None:
            raise CarpoolError(f"{self.name}: the engine bypassed its experts, so surrogates were not added; refused")

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights, on this rank; of planes, at the deepest depth."""
        experts = self.runner.routed_experts
        if self.depth_NK is not None:
            return int(experts.quant_method.expert_bytes)
        return int(sum(weight.nbytes for weight in experts.parameters()) // experts.local_num_experts)

    @property
    def deepest(self) -> int:
        """Bits of an expert's weights that is read whole."""
        return ALL_BITS if self.depth_NK is None else int(self.runner.routed_experts.quant_method.carpool_depths[-1])

    @property
    def bit_bytes(self) -> int:
        """Of one bit of all of an expert's weights, on this rank; 0 where they are no planes."""
        return 0 if self.depth_NK is None else int(self.runner.routed_experts.quant_method.bit_bytes)

    @property
    def replicas(self) -> int:
        """Copies of experts beside their first ones (EPLB), over all ranks."""
        moe = self.runner.moe_config
        return int(moe.num_experts - moe.num_logical_experts)

    @property
    def surrogate_bytes(self) -> int:
        """Of one expert's surrogate, on this rank; 0 without any."""
        return 0 if self.resident is None else self.resident.bytes
