"""What the plugin knows of an engine's MoE layers while it runs: one `Layer` each, and the `Step` that all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.identity import Sample
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
        forward_rows: asked, where no batch runs (profiling, capture of a graph), how many rows the engine says that it
            forwards; 0 where it does not say.
    """

    rows: Rows
    counters: Counters
    graphs: bool
    enabled: bool = True
    observer: Any = None
    forward_rows: Callable[[], int] = int


@dataclass(frozen=True)
class Experts:
    """What a rank holds of a layer's experts.

    Attributes:
        bytes: of one expert's weights; of planes, at the deepest depth.
        hidden_size: `H` without the padding of a kernel.
        depths: at which planes can be read; none where weights are whole.
        bit_bytes: of one bit of all of an expert's weights; 0 where weights are whole.
        replicas: copies of experts beside their first ones (EPLB), over all ranks.
    """

    bytes: int = 0
    hidden_size: int = 0
    depths: tuple[int, ...] = ()
    bit_bytes: int = 0
    replicas: int = 0


def _never_taken() -> Sample:
    return Sample(hidden="weights that nobody looked at")


@dataclass(eq=False)
class Layer:
    """One MoE layer of one engine.

    Attributes:
        name: the engine's name of the layer. index: its number in that name. position: its row in the counters.
        router: the engine's object that routes. spec: how it does. num_experts, hidden_size: `E` and `H`.
        runner: the engine's object that runs the experts. experts: what this rank holds of them.
        sample: asked for a sample of the experts' weights as they are now.
        stand_ins: asked for the layer's surrogates on this rank, CarpoolError where they do not fit; None: it has
            none.
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
    experts: Experts = field(default_factory=Experts)
    sample: Callable[[], Sample] = _never_taken
    stand_ins: Callable[[Layer], Resident] | None = None
    resident: Resident | None = None
    depth_NK: Tensor | None = None
    left: tuple[Tensor, Tensor] | None = None

    def require_added(self) -> None:
        """Raises CarpoolError if pairs were left to surrogates and the experts ran without them."""
        if self.left is not None:
            raise CarpoolError(f"{self.name}: the engine bypassed its experts, so surrogates were not added; refused")

    @property
    def deepest(self) -> int:
        """Bits of an expert's weights that is read whole."""
        return self.experts.depths[-1] if self.experts.depths else ALL_BITS

    @property
    def surrogate_bytes(self) -> int:
        """Of one expert's surrogate, on this rank; 0 without any."""
        return 0 if self.resident is None else self.resident.bytes
