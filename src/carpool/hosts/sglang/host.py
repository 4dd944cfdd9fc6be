"""One scheduler's share of the plugin: the routers of its model, checked, and the batch followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.engine import host
from carpool.hosts.engine.fitting import Gates
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.routed import routed
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.hosts.sglang import denoising, follow
from carpool.hosts.sglang.arm import apply, around
from carpool.hosts.sglang.distinct import distinct
from carpool.hosts.sglang.engine import check_files, check_seams, require_isolated
from carpool.hosts.sglang.layers import build_layers, gates_of
from carpool.hosts.sglang.prefix_cache import prompts_only
from carpool.hosts.sglang.weights import Weights
from carpool.plans.grammar import Plan
from carpool.plans.policy_file import PolicyFile
from carpool.routing.spec import Routing

MOST_REQUESTS = 4096  # SGLang's own bound where none is configured
_layers: dict[int, Layer] = {}  # of this process' engine, by the identity of their `TopKConfig`


class Host(host.Host):
    """See the module.

    Attributes:
        runner: SGLang's runner of the target model. cfg: its server's arguments, resolved.
    """

    def __init__(self, runner: Any, settings: Settings) -> None:
        from sglang.srt.arg_groups.overrides import resolving_view

        super().__init__(settings, _on_all_ranks)
        self.runner, self.cfg = runner, resolving_view(runner.server_args)
        self._unpublished = False

    @classmethod
    def attach(cls, runner: Any, settings: Settings) -> Host:
        """Let the policy into a loaded model, and follow its batches.

        Raises:
            CarpoolError: no MoE layer, a layer that bypasses its router, a router that is not understood, a policy or
                statistics that do not fit the model.
        """
        mine = cls(runner, settings)
        check_seams()
        cfg, device = mine.cfg, torch.device(runner.device)
        layers = build_layers(runner.model, settings, device)
        requests = cfg.max_running_requests or MOST_REQUESTS
        drafts = cfg.speculative_num_draft_tokens or 1
        longest = max(cfg.chunked_prefill_size or 0, cfg.max_prefill_tokens or 0, runner.model_config.context_len)
        rows = Rows(longest + requests * drafts, requests, settings.group.kind, device, settings.isolation)
        graphs = device.type != "cpu" and cfg.cuda_graph_config.decode.backend != "disabled"
        labels = str(cfg.served_model_name), "0"
        mine.start(rows, layers, graphs, labels, _first())
        mine.weights = Weights(settings.policies, layers, mine.gates, mine.show)
        mine.weights.watch(runner.model)
        _layers.clear()
        _layers.update({id(layer.router.topk_config): layer for layer in layers})
        runner.carpool = mine
        around("sglang.srt.layers.moe.topk.select_experts", shared)
        around("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", follow.remembered)
        around("sglang.srt.model_executor.model_runner.ModelRunner.forward", _forwarded)
        around("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint", prompts_only)
        denoising.follow_denoising(cfg, settings.voters)
        apply()
        mine.show()
        mine.say("starts")
        return mine

    def gates(self) -> Gates:
        return gates_of(self.layers)

    def require_isolated(self, plan: Plan, settings: Settings) -> None:
        require_isolated(plan, settings, self.cfg)

    def check_files(self, policies: PolicyFile) -> None:
        check_files(self.cfg, policies)

    @property
    def eager(self) -> bool:
        return self.step is not None and not self.step.graphs

    def forward(self, original: Callable[..., Any], forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward pass, with its rows known."""
        assert self.step is not None
        self.weights.settle()
        rows, requests = self.step.rows, self._requests(forward_batch)
        if requests is not None:
            count = int(requests.lengths.sum())
            # a recorded graph also computes rows of padding, whose number it chooses itself
            rows.fill(requests, rows.size - 1 if self.step.graphs else len(forward_batch.input_ids))
            rows.expected = 0 if self.step.graphs else rows.expected
            if not self.step.graphs and count != rows.expected:
                raise CarpoolError(
                    f"a forward pass of {rows.expected} rows for {count} of its requests is not followed"
                )
        try:
            result = original(self.runner, forward_batch, *args, **kwargs)
            if requests is not None:
                self.stepped()
        finally:
            rows.clear()
        if self.metrics is not None:
            self.metrics.publish()
            self._unpublished = True
        return result

    def publish_all(self) -> None:
        """The metrics of the last steps, once nothing runs any more; SGLang asks again and again then."""
        if self.metrics is not None and self._unpublished:
            self._unpublished = False
            self.metrics.publish(now=True)

    def _requests(self, forward_batch: Any) -> Requests | None:
        assert self.step is not None
        if not self.step.enabled or self.foreign:
            return None
        if forward_batch.forward_mode.is_dllm_extend():
            return denoising.requests_of(forward_batch, self.settings)
        return follow.requests_of(forward_batch)


def shared(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `select_experts`: the one place that all routers of SGLang come through.

    Raises:
        CarpoolError: see `routed`; or a bias for single tokens, which policies would not see.
    """
    native = original(*args, **kwargs)
    config = kwargs["topk_config"] if "topk_config" in kwargs else args[2]
    layer = _layers.get(id(config))
    if layer is None:
        return native
    if kwargs.get("dynamic_expert_bias") is not None:
        raise CarpoolError(f"{layer.name} routes some tokens by another bias, which Carpool does not model yet")
    hidden_NH: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    logits_NE: Tensor = kwargs["router_logits"] if "router_logits" in kwargs else args[1]
    given = Routing(native.topk_ids.int(), native.topk_weights)
    routing = routed(layer, hidden_NH, logits_NE, given)
    if routing is given:
        return native
    ids_NK = routing.ids_NK
    if layer.device.type == "cpu":
        ids_NK = distinct(ids_NK, routing.weights_NK, layer.num_experts)
    return native._replace(
        topk_ids=ids_NK.to(native.topk_ids.dtype), topk_weights=routing.weights_NK.to(native.topk_weights.dtype)
    )


def _forwarded(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    mine: Host | None = getattr(runner, "carpool", None)
    if mine is None:
        return original(runner, forward_batch, *args, **kwargs)
    return mine.forward(original, forward_batch, *args, **kwargs)


def _first() -> bool:
    """All ranks decide alike; one of them reports."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().tp_rank == 0)


def _on_all_ranks(condition: bool) -> bool:
    """Whether it holds on every rank of this tensor parallel group; all of them must ask."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return condition
    holds = torch.tensor([int(condition)])
    torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(holds)
