"""One worker's share of the plugin: finds the routers while the model is loaded, checks them, follows the batch.

All state hangs on the worker, so two engines in one process do not meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from carpool.experts.surrogates import NAMES
from carpool.hosts.engine.compiled import Compiler
from carpool.hosts.engine.fused import Kernels, compiles
from carpool.hosts.engine.in_force import say
from carpool.hosts.engine.knobs import Knobs
from carpool.hosts.engine.layer import Layer, Step
from carpool.hosts.engine.metrics import Metrics
from carpool.hosts.engine.proof import Proof
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Rows
from carpool.hosts.engine.steps import Steps
from carpool.hosts.vllm.expert_samples import sampling
from carpool.hosts.vllm.follow import drafter, follow
from carpool.hosts.vllm.layers import build_layers
from carpool.hosts.vllm.metrics import labels_of
from carpool.hosts.vllm.planes import new_buffer, stored_depths
from carpool.hosts.vllm.ranks import first_of_tensor_parallel, on_all_ranks
from carpool.hosts.vllm.router import define_op, shared_class
from carpool.hosts.vllm.supplement import hook
from carpool.hosts.vllm.weights import Weights
from carpool.plans.counters import Counters
from carpool.plans.grammar import Plan


class Host:
    """See the module.

    Attributes:
        worker: vLLM's worker. settings: the user's. step: what all layers share, once the model is loaded.
        layers: the MoE layers of this worker. weights: whether they are those that the files describe.
    """

    def __init__(self, worker: Any, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.layers: list[Layer] = []
        self.compiler = Compiler(settings.group.kind, on_all_ranks)
        self.step: Step | None = None
        self.metrics: Metrics | None = None
        self.kernels: Kernels | None = None
        self.weights: Weights | None = None
        self.proof: Proof | None = None
        self.steps: Steps | None = None
        self._warming = False

    @classmethod
    def attach(cls, worker: Any, settings: Settings) -> Host:
        """Follow a worker from its construction: wraps what loads, warms up and replaces the model."""
        host = cls(worker, settings)
        worker.carpool = host
        load_model = worker.load_model

        def loaded(*args: Any, **kwargs: Any) -> Any:
            if torch.cpu._is_amx_tile_supported():
                torch.cpu._init_amx()  # a tiny model may reach an AMX kernel before oneDNN asks for the permission
            with host._collecting(), sampling() if settings.policies.statistics else contextlib.nullcontext():
                result = load_model(*args, **kwargs)
            host._finish()
            return result

        worker.load_model = loaded
        warm_up = worker.compile_or_warm_up_model

        def warmed(*args: Any, **kwargs: Any) -> Any:
            host._warming = True  # the V2 runner sends made-up requests the way of real ones
            try:
                return warm_up(*args, **kwargs)
            finally:
                host._warming = False
                host.count_anew()

        worker.compile_or_warm_up_model = warmed
        return host

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """While the target model is built, its routers become shared ones; nothing stays patched afterwards."""
        from vllm.model_executor.layers.fused_moe import layer as factory

        define_op()
        runner = self.worker.model_runner
        create = factory.create_fused_moe_router
        drafting = False

        def create_shared(*args: Any, **kwargs: Any) -> Any:
            router = create(*args, **kwargs)
            if not drafting:
                kind: Any = type(router)
                router.__class__ = shared_class(kind)
            return router

        drafts = drafter(runner)
        load_drafter: Any = getattr(drafts, "load_model", None)

        def load_untouched(*args: Any, **kwargs: Any) -> Any:
            nonlocal drafting
            drafting = True
            try:
                return load_drafter(*args, **kwargs)
            finally:
                drafting = False

        factory.create_fused_moe_router = create_shared
        if load_drafter is not None:
            drafts.load_model = load_untouched
        try:
            yield
        finally:
            factory.create_fused_moe_router = create
            if load_drafter is not None:
                del drafts.load_model

    def _finish(self) -> None:
        """Check every router of the loaded model, then let the policy in.

        Raises:
            CarpoolError: no MoE layer, a layer that bypasses its router, a router that is not understood, a policy
                or statistics that do not fit the model.
        """
        worker, runner = self.worker, self.worker.model_runner
        config, device = worker.vllm_config, worker.device
        graphs = device.type != "cpu" and bool(config.compilation_config.cudagraph_mode)
        rows = Rows(
            runner.max_num_tokens,
            config.scheduler_config.max_num_seqs,
            self.settings.group.kind,
            device,
            self.settings.isolation,
        )
        self.layers = build_layers(runner.get_model(), self.settings, config, device)
        self.step = Step(rows, Counters([layer.name for layer in self.layers], device), graphs)
        for layer in self.layers:
            layer.step = self.step
            layer.router.carpool_layer = layer
            if stored_depths(layer.runner):
                method = layer.runner.routed_experts.quant_method
                method.buffer = layer.depth_NK = new_buffer(runner.max_num_tokens, layer.spec.top_k, device)
            if any(name in layer.statistics for name in NAMES):  # a policy may ask for them later
                hook(layer)
        plans, stats = [layer.plan for layer in self.layers], [layer.stats for layer in self.layers]
        self.kernels = Kernels(rows, on_all_ranks)
        self.use_plans(plans, stats, self._compiles(device), self.settings.compile is not False)
        if hasattr(runner, "model_memory_usage"):  # where vLLM measures: what is left is for keys and values
            runner.model_memory_usage += self.surrogate_memory + self.kernels.memory
        self.proof = Proof(self.step, self.layers)
        self.steps = Steps(rows, self.layers)
        self.metrics = Metrics(
            self.step.counters, self.layers, first_of_tensor_parallel(), self.proof, self.steps, labels_of(config)
        )
        self.weights = Weights(runner.get_model(), self.settings.policies, self.layers, self._show)
        self.weights.watch(worker)
        self._show()
        self._follow(runner, self.step)
        say(self, "starts")

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
        self._show()

    def _show(self) -> None:
        if self.metrics is not None and self.step is not None:
            self.metrics.enabled(self.step.enabled and not self.foreign)

    def _follow(self, runner: Any, step: Step) -> None:
        proof, steps = self.proof, self.steps
        assert proof is not None
        assert steps is not None

        def stepped() -> None:
            steps.stepped()
            proof.stepped()

        follow(runner, step.rows, lambda: step.enabled and not (self._warming or self.foreign), stepped)
        execute = runner.execute_model

        def published(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if self.weights is not None and scheduled.total_num_scheduled_tokens:
                self.weights.settle()
            result = execute(scheduled, *args, **kwargs)
            if self.metrics is not None:  # an empty step tells that all requests have ended
                self.metrics.publish(now=not scheduled.total_num_scheduled_tokens)
            return result

        runner.execute_model = published
