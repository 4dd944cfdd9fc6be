"""One worker's share of the plugin: finds the routers while the model is loaded, checks them, follows the batch.

All state hangs on the worker, so two engines in one process do not meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from carpool.hosts.engine import host
from carpool.hosts.engine.fitting import Gates
from carpool.hosts.engine.layer import Layer, Step
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Rows
from carpool.hosts.vllm.engine import check_files
from carpool.hosts.vllm.expert_samples import sampling
from carpool.hosts.vllm.follow import drafter, follow
from carpool.hosts.vllm.isolation import require_isolated
from carpool.hosts.vllm.layers import build_layers, gates_of
from carpool.hosts.vllm.metrics import labels_of
from carpool.hosts.vllm.planes import new_buffer
from carpool.hosts.vllm.ranks import first_of_tensor_parallel, on_all_ranks
from carpool.hosts.vllm.router import define_op, rows_of_this_forward, shared_class
from carpool.hosts.vllm.supplement import hook
from carpool.hosts.vllm.weights import Weights
from carpool.plans.grammar import Plan
from carpool.plans.policy_file import PolicyFile


class Host(host.Host):
    """See the module.

    Attributes:
        worker: vLLM's worker.
    """

    def __init__(self, worker: Any, settings: Settings) -> None:
        super().__init__(settings, on_all_ranks)
        self.worker = worker
        self._warming = False

    def gates(self) -> Gates:
        return gates_of(self.worker.model_runner.get_model(), self.layers)

    def require_isolated(self, plan: Plan, settings: Settings) -> None:
        require_isolated(plan, settings, self.worker.vllm_config)

    def check_files(self, policies: PolicyFile) -> None:
        check_files(self.worker.vllm_config, policies)

    @property
    def eager(self) -> bool:
        return bool(self.worker.vllm_config.model_config.enforce_eager)

    def supplement(self, layer: Layer) -> None:
        hook(layer)

    @classmethod
    def attach(cls, worker: Any, settings: Settings) -> Host:
        """Follow a worker from its construction: wraps what loads, warms up and replaces the model."""
        mine = cls(worker, settings)
        worker.carpool = mine
        load_model = worker.load_model

        def loaded(*args: Any, **kwargs: Any) -> Any:
            if torch.cpu._is_amx_tile_supported():
                torch.cpu._init_amx()  # a tiny model may reach an AMX kernel before oneDNN asks for the permission
            with mine._collecting(), sampling() if settings.policies.statistics else contextlib.nullcontext():
                result = load_model(*args, **kwargs)
            mine._finish()
            return result

        worker.load_model = loaded
        warm_up = worker.compile_or_warm_up_model

        def warmed(*args: Any, **kwargs: Any) -> Any:
            mine._warming = True  # the V2 runner sends made-up requests the way of real ones
            try:
                return warm_up(*args, **kwargs)
            finally:
                mine._warming = False
                mine.count_anew()

        worker.compile_or_warm_up_model = warmed
        return mine

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
        layers = build_layers(runner.get_model(), self.settings, config, device)
        for layer in layers:
            layer.router.carpool_layer = layer
            if layer.experts.depths:
                method = layer.runner.routed_experts.quant_method
                method.buffer = layer.depth_NK = new_buffer(runner.max_num_tokens, layer.spec.top_k, device)
        step = self.start(rows, layers, graphs, labels_of(config), first_of_tensor_parallel(), rows_of_this_forward)
        if hasattr(runner, "model_memory_usage"):  # where vLLM measures: what is left is for keys and values
            runner.model_memory_usage += self.surrogate_memory + (0 if self.kernels is None else self.kernels.memory)
        self.weights = Weights(self.settings.policies, self.layers, self.gates, self.show)
        self.weights.watch(worker, runner.get_model())
        self.show()
        self._follow(runner, step)
        self.say("starts")

    def _follow(self, runner: Any, step: Step) -> None:
        follow(runner, step.rows, lambda: step.enabled and not (self._warming or self.foreign), self.stepped)
        execute = runner.execute_model

        def published(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if self.weights is not None and scheduled.total_num_scheduled_tokens:
                self.weights.settle()
            result = execute(scheduled, *args, **kwargs)
            if self.metrics is not None:  # an empty step tells that all requests have ended
                self.metrics.publish(now=not scheduled.total_num_scheduled_tokens)
            return result

        runner.execute_model = published
