"""Routing by kernels of our own where Triton runs: two launches a layer beside the router's, counters included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.engine.log import log
from carpool.kernels.traits import uncovered
from carpool.plans.counters import FIELDS
from carpool.plans.grammar import Plan
from carpool.plans.pipeline import decide, scored
from carpool.routing.batch import Batch
from carpool.routing.spec import Routing

if TYPE_CHECKING:
    from carpool.hosts.engine.layer import Layer
    from carpool.hosts.engine.step_rows import Rows

DEVICES = ("cuda",)
CHECKED = 8  # rows
LAUNCHES, GRAPH, OPERATIONS = "two launches", "compiled graph", "operation by operation"


def path(layer: Layer) -> str:
    """How a layer's plan runs."""
    if layer.fused is not None:
        return LAUNCHES
    return OPERATIONS if layer.graph is None else GRAPH


def obstacle(
    device: torch.device, plan: Plan, num_experts: int, top_k: int, *, triton: bool | None = None
) -> str | None:
    """Why a plan cannot run in two launches on a device; None if it can.

    Args:
        triton: whether Triton is there; None: look.
    """
    if device.type not in DEVICES:
        return f"the kernels of routing run on {' or '.join(DEVICES)}, not on {device.type}"
    if not (importlib.util.find_spec("triton") is not None if triton is None else triton):
        return "Triton is not installed"
    return uncovered(plan, num_experts, top_k)


def path_on(device: torch.device, plan: Plan, num_experts: int, top_k: int, *, triton: bool | None = None) -> str:
    """How a plan would run on a device, and why not better: `path` before there is an engine, with its defaults.

    Args:
        triton: see `obstacle`.
    """
    cause = obstacle(device, plan, num_experts, top_k, triton=triton)
    if cause is None:
        return LAUNCHES
    return GRAPH if compiles(device) else f"{OPERATIONS}: {cause}"


def compiles(device: torch.device) -> bool:
    """Whether routing is compiled there unless the user says otherwise: where it was tried."""
    return device.type == "cpu"


class Kernels:
    """The launches of all layers of an engine, and the buffers that these share.

    Args:
        rows: of the engine.
        agree: whether a condition holds on all ranks that must decide alike.
    """

    def __init__(self, rows: Rows, agree: Callable[[bool], bool] = bool) -> None:
        self._rows, self._agree = rows, agree
        self._scratch: Any = None
        self._tried: set[str] = set()

    @property
    def memory(self) -> int:
        """Bytes of the buffers."""
        return 0 if self._scratch is None else self._scratch.memory

    def regroup(self, layers: list[Layer]) -> None:
        """The rows have another grouping: buffers have another size, and launches hold the old ones."""
        self._scratch, self._tried = None, set()
        for layer in layers:
            layer.fused = None

    def use(self, layers: list[Layer], try_new: bool) -> None:
        """Give every layer the launches of its plan, or none where there is an obstacle.

        Args:
            layers: with their plans.
            try_new: compile and try kinds of plans that were not tried before, which takes a while; otherwise these run
                without.
        """
        fit = [
            layer for layer in layers if obstacle(layer.device, layer.plan, layer.num_experts, layer.spec.top_k) is None
        ]
        works = True
        try:
            made = [self._made(layer, try_new) for layer in fit]
        except Exception as error:  # a compiler may fail in any way, and routing works without it
            cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            log().warning("carpool routes without its kernels, which costs speed: %s", cause)
            works, made = False, []
        for layer in layers:
            layer.fused = None
        if fit and self._agree(works):
            for layer, launches in zip(fit, made, strict=True):
                layer.fused = launches

    def _made(self, layer: Layer, try_new: bool) -> Any:
        from carpool.kernels.launch import Fused, Scratch

        assert layer.knobs is not None
        if layer.fused is not None and layer.fused.plan is layer.knobs.plan:
            return layer.fused  # recorded graphs hold its tensors
        kind = repr((layer.knobs.kind, layer.num_experts, layer.spec))
        if kind not in self._tried and not try_new:
            return None
        if self._scratch is None:
            groups = 1 if self._rows.group == "batch" else self._rows.max_requests
            self._scratch = Scratch(self._rows.size, groups, layer.num_experts, layer.device)
        made = Fused(layer.knobs.plan, layer.spec, layer.num_experts, layer.stats, self._scratch)
        if kind not in self._tried:
            _check(layer, made)
            self._tried.add(kind)
        return made


def _check(layer: Layer, made: Any) -> None:
    """Run a plan on made-up rows both ways.

    Raises:
        CarpoolError: the launches choose other experts than the same plan operation by operation.
    """
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(CHECKED, layer.num_experts, generator=generator).to(layer.device)
    hidden_NH = torch.randn(CHECKED, layer.hidden_size, generator=generator).to(layer.device)
    batch, totals_F = Batch.of(CHECKED, device=layer.device), logits_NE.new_zeros(len(FIELDS), dtype=torch.float64)
    native = layer.spec.native(logits_NE)
    scores = scored(layer.spec, logits_NE)
    outcome = decide(
        layer.plan, layer.spec, logits_NE, *scores, batch, native=native, stats=layer.stats, hidden_NH=hidden_NH
    )
    found = made(
        logits_NE, native, batch, totals_F, scores=scores, energy_NE=_energy(layer, hidden_NH)
    )  # fmt: skip
    made(logits_NE, native, batch, totals_F, energy_NE=_energy(layer, hidden_NH))  # the form that scores, compiled now
    if not torch.equal(found.ids_NK, outcome.routing.ids_NK):
        raise CarpoolError(f"{layer.name}: the kernels of routing choose other experts than the same plan without them")


def run(layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing, rows: Rows) -> Routing | None:
    """Routing of one call, counted; None for more rows than the buffers hold."""
    step, made = layer.step, layer.fused
    assert step is not None
    assert made is not None
    batch = rows.batch(len(logits_NE))
    if not made.scratch.fits(len(logits_NE), batch):
        return None
    contiguous = Routing(native.ids_NK.contiguous(), native.weights_NK.contiguous())
    totals_F = step.counters.of_layer(layer.position)
    routing: Routing = made(
        logits_NE.contiguous(), contiguous, batch, totals_F, energy_NE=_energy(layer, hidden_NH), follow=step.graphs
    )
    return routing


def _energy(layer: Layer, hidden_NH: Tensor) -> Tensor | None:
    policy: Any = layer.plan.policy
    return policy.energy_NE(hidden_NH, layer.stats) if policy.needs_hidden else None
