"""What the host of a serving engine is, whatever the engine: layers under plans, counted, and changed while it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carpool.experts.surrogates import NAMES
from carpool.hosts.engine.compiled import Compiler
from carpool.hosts.engine.fitting import Gates
from carpool.hosts.engine.fused import Kernels, compiles
from carpool.hosts.engine.in_force import say
from carpool.hosts.engine.knobs import Knobs
from carpool.hosts.engine.layer import Layer, Step
from carpool.hosts.engine.metrics import Labels, Metrics
from carpool.hosts.engine.proof import Proof
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Rows
from carpool.hosts.engine.steps import Steps
from carpool.plans.counters import Counters
from carpool.plans.grammar import Plan
from carpool.plans.policy_file import PolicyFile


class Host(ABC):
    """One worker's share of a plugin. All state hangs on it, so two engines in one process do not meet.

    Args:
        settings: the user's.
        agree: whether a condition holds on all ranks that must decide alike.

    Attributes:
        step: what all layers share, once the model is loaded. layers: the MoE layers of this worker.
        weights: with `foreign`, why no policy may run on the weights that the model has now, and `policies`, what the
            user gave last, with the files.
    """

    def __init__(self, settings: Settings, agree: Callable[[bool], bool] = bool) -> None:
        self.settings, self._agree = settings, agree
        self.layers: list[Layer] = []
        self.compiler = Compiler(settings.group.kind, agree)
        self.step: Step | None = None
        self.metrics: Metrics | None = None
        self.kernels: Kernels | None = None
        self.weights: Any = None
        self.proof: Proof | None = None
        self.steps: Steps | None = None

    @abstractmethod
    def gates(self) -> Gates:
        """The weight of every layer's gate as it is now."""

    @abstractmethod
    def require_isolated(self, plan: Plan, settings: Settings) -> None:
        """Raises CarpoolError for a plan that would let requests depend on each other further than the operator or the
        engine allows."""

    @abstractmethod
    def check_files(self, policies: PolicyFile) -> None:
        """Raises CarpoolError for files of which nobody could tell whether they are of the model that runs."""

    @property
    @abstractmethod
    def eager(self) -> bool:
        """Whether the engine neither records nor compiles what the experts do."""

    def supplement(self, layer: Layer) -> None:  # noqa: B027  # engines without surrogates need none
        """Let what surrogates give be added to the output of the layer's experts."""

    def start(self, rows: Rows, layers: list[Layer], graphs: bool, labels: Labels, publishes: bool,
              forward_rows: Callable[[], int] = int) -> Step:  # fmt: skip
        """Let the policies into the layers of a loaded model, each with its checked plan.

        Args:
            rows: of the engine.
            layers: checked.
            graphs: whether the engine records graphs.
            labels: of the metrics.
            publishes: False on all but one of the ranks that decide alike.
            forward_rows: see `Step`.
        """
        device = layers[0].device if layers else torch.device("cpu")
        self.layers = layers
        self.step = Step(rows, Counters([layer.name for layer in layers], device), graphs, forward_rows=forward_rows)
        for layer in layers:
            layer.step = self.step
            if any(name in layer.statistics for name in NAMES):  # a policy may ask for them later
                self.supplement(layer)
        plans, stats = [layer.plan for layer in layers], [layer.stats for layer in layers]
        self.kernels = Kernels(rows, self._agree)
        self.use_plans(plans, stats, self._compiles(device), self.settings.compile is not False)
        self.proof = Proof(self.step, layers)
        self.steps = Steps(rows, layers)
        self.metrics = Metrics(self.step.counters, layers, publishes, self.proof, self.steps, labels)
        return self.step

    def stepped(self) -> None:
        """After a forward pass of a batch, while its rows are known."""
        assert self.steps is not None
        assert self.proof is not None
        self.steps.stepped()
        self.proof.stepped()

    def say(self, what: str) -> None:
        """One line in the engine's log."""
        say(self, what)

    @property
    def surrogate_memory(self) -> int:
        """Bytes of all layers' surrogates on this worker's device."""
        return sum(layer.resident.memory for layer in self.layers if layer.resident is not None)

    def _compiles(self, device: torch.device) -> bool:
        """As the user says."""
        return compiles(device) if self.settings.compile is None else self.settings.compile

    def use_plans(
        self, plans: list[Plan], stats: list[dict[str, Tensor]], compile_new: bool, kernels_new: bool
    ) -> None:
        """Put a plan into each layer, all or none.

        Args:
            plans: one a layer.
            stats: what each plan needs of its layer's statistics.
            compile_new: compile kinds of plans that were not compiled before, which takes a while.
            kernels_new: the same for the kernels of routing, where there are some.

        Raises:
            CarpoolError: recorded graphs can take other numbers only.
        """
        assert self.step is not None
        if self.step.graphs:
            for layer, plan in zip(self.layers, plans, strict=True):
                if layer.knobs is not None:
                    layer.knobs.check(plan)
        for layer, plan, tensors in zip(self.layers, plans, stats, strict=True):
            if layer.knobs is not None and layer.knobs.fits(plan):
                layer.knobs.set(plan)
                for name, tensor in tensors.items():  # recorded graphs read these very tensors
                    layer.stats[name].copy_(tensor)
            else:
                layer.knobs, layer.stats = Knobs(plan, layer.num_experts, layer.device), tensors
            layer.plan = plan
        if self.kernels is not None:
            self.kernels.use(self.layers, kernels_new)
        self.compiler.use(self.layers, compile_new)

    def regroup(self, settings: Settings) -> None:
        """Take settings that differ by their grouping, between two steps; `use_plans` has to follow."""
        assert self.step is not None
        self.settings = settings
        self.step.rows.regroup(settings.group.kind)
        self.compiler.group = settings.group.kind
        if self.kernels is not None:
            self.kernels.regroup(self.layers)

    def count_anew(self) -> None:
        """All counters from zero, once what they hold is published."""
        if self.step is None or self.metrics is None or self.proof is None or self.steps is None:
            return
        self.metrics.publish(now=True)
        self.steps.begin()
        self.step.counters.reset()
        self.metrics.forget()
        self.proof.begin()

    @property
    def foreign(self) -> str:
        """Why no policy may run on the weights that the model has now, or empty."""
        return "" if self.weights is None else self.weights.foreign

    def enable(self, value: bool) -> None:
        """Switch policies off and on."""
        assert self.step is not None
        self.step.enabled = value
        self.show()

    def show(self) -> None:
        if self.metrics is not None and self.step is not None:
            self.metrics.enabled(self.step.enabled and not self.foreign)
