"""Both of vLLM's model runners: shared within the budget, isolated, and proved to run by the device's own counters.

`make test` runs this file twice, the second time with the V2 runner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import CarpoolError

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm
MADE_UP: list[int] = []  # rows of forward passes while an engine warmed up


@functools.cache
def engine() -> Any:
    """An engine that warms up as on a GPU, where the V2 runner sends made-up requests the way of real ones."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    warm_up = CPUWorker.compile_or_warm_up_model

    def warmed(worker: Any) -> Any:
        from carpool.hosts.vllm import router

        routed = router.routed

        def seen(layer: Any, hidden_NH: torch.Tensor, *given: Any) -> Any:
            MADE_UP.append(len(hidden_NH))
            return routed(layer, hidden_NH, *given)

        router.routed = seen
        try:
            if tiny.v2():
                from vllm import SamplingParams
                from vllm.v1.worker.gpu.warmup import warmup_kernels

                # every feature of the sampler takes the interpreter minutes
                SamplingParams.for_sampler_warmup = lambda: SamplingParams(temperature=0)
                warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
            else:
                worker.model_runner._dummy_run(16)
        finally:
            router.routed = routed
        return warm_up(worker)

    CPUWorker.compile_or_warm_up_model = warmed
    try:
        return tiny.engine(tiny.qwen3(), tiny.SHARING)
    finally:
        CPUWorker.compile_or_warm_up_model = warm_up


def counted(llm: Any) -> list[dict[str, Any]]:
    """Counters of every layer since the last call."""
    layers: list[dict[str, Any]] = llm.collective_rpc("carpool_report", kwargs={"reset": True})[0]["layers"]
    return layers


def test_the_runner_is_the_one_that_was_asked_for() -> None:
    kinds = {kind.__module__ for kind in type(tiny.runner(engine())).__mro__}
    assert ("vllm.v1.worker.gpu.model_runner" in kinds) is tiny.v2()
    assert ("vllm.v1.worker.gpu_model_runner" in kinds) is not tiny.v2()


def test_made_up_requests_count_nothing() -> None:
    layers = counted(engine())
    assert MADE_UP
    for layer in layers:
        assert not any(value for name, value in layer.items() if name != "layer" and not name.endswith("_bytes"))


def test_decoding_stays_within_the_budget_and_prompts_are_native() -> None:
    llm = engine()
    calls = tiny.watch(llm)
    shared = tiny.generate(llm, tiny.prompts(6))
    tiny.host(llm).step.observer = None
    tiny.assert_bounded(calls, tiny.BUDGET)
    assert len(calls) == 2 * 7  # two layers; the first of eight tokens comes from the prompt
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    native = tiny.generate(llm, tiny.prompts(6))
    llm.collective_rpc("carpool_set", kwargs={"enabled": True})
    assert [ids[0] for ids, _ in shared] == [ids[0] for ids, _ in native]
    assert shared != native


def test_who_opts_out_is_native_beside_those_who_share() -> None:
    from vllm import SamplingParams

    llm, given = engine(), tiny.prompts(9, seed=6)
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    native = tiny.generate(llm, given)
    llm.collective_rpc("carpool_set", kwargs={"enabled": True})
    common: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "detokenize": False, "ignore_eos": True}
    out = SamplingParams(**common, extra_args={"carpool": "off"})
    mixed = [SamplingParams(**common) if i % 3 else out for i in range(9)]
    counted(llm)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in given], mixed, use_tqdm=False)
    assert [list(outputs[i].outputs[0].token_ids) for i in (0, 3, 6)] == [native[i][0] for i in (0, 3, 6)]
    for layer in counted(llm):
        assert (layer["rows"], layer["rows_exempt"]) == (63, 21)
        assert layer["rows_changed"] > 0


def test_requests_of_one_token_are_said_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    from prometheus_client import REGISTRY

    def read() -> float:
        labels = {"model_name": str(tiny.qwen3()), "engine": "0"}
        return REGISTRY.get_sample_value("carpool_requests_prompt_only_total", labels) or 0.0

    llm, before = engine(), read()
    tiny.generate(llm, tiny.prompts(3), tokens=1)
    assert read() == before + 3
    tiny.generate(llm, tiny.prompts(3), tokens=2)
    assert read() == before + 3


def test_rows_are_compared_with_the_engines_own_word_where_no_batch_runs() -> None:
    """As when a graph is recorded."""
    from vllm.forward_context import BatchDescriptor, set_forward_context

    from carpool import Routing
    from carpool.hosts.vllm.router import routed

    llm = engine()
    layer, config = tiny.host(llm).layers[0], tiny.runner(llm).vllm_config
    native = Routing(torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 4))
    given = (torch.zeros(4, 64), torch.zeros(4, tiny.EXPERTS), native)
    with set_forward_context(None, config, num_tokens=4, batch_descriptor=BatchDescriptor(4)):
        routed(layer, *given)
    with (
        set_forward_context(None, config, num_tokens=8, batch_descriptor=BatchDescriptor(8)),
        pytest.raises(CarpoolError, match="sees 4 rows of a forward pass of 8"),
    ):
        routed(layer, *given)


def bypass_decoding(llm: Any) -> Callable[[], None]:
    """What a fused front does: prompts go through the router, small batches past it. Returns what takes it away."""
    router = tiny.host(llm).layers[1].router
    stock, through = type(router).__mro__[1]._compute_routing, router._compute_routing

    def front(hidden: torch.Tensor, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden) > 8:
            return through(hidden, logits, *args, **kwargs)
        return stock(router, hidden, logits, *args, **kwargs)

    router._compute_routing = front
    return lambda: delattr(router, "_compute_routing")


def test_a_bypass_that_begins_later_is_found_when_the_counters_are_read() -> None:
    llm = engine()
    counted(llm)
    tiny.generate(llm, tiny.prompts(6))
    take_away = bypass_decoding(llm)
    tiny.host(llm).metrics._next = float("inf")
    tiny.generate(llm, tiny.prompts(6), tokens=3)
    with pytest.raises(CarpoolError, match=r"in 2 of \d+ steps"):
        tiny.host(llm).metrics.publish(now=True)
    take_away()
    tiny.host(llm).metrics._next = 0.0
    tiny.host(llm).proof.begin()


def test_a_front_that_passes_by_the_router_on_decoding_only_stops_the_engine() -> None:
    """The last test: this engine serves nobody any more."""
    llm = engine()
    tiny.generate(llm, tiny.prompts(6))  # proved: what comes now is a change while it runs
    counted(llm)
    take_away = bypass_decoding(llm)
    with pytest.raises(CarpoolError, match=r"layers\.1\.mlp\.experts: the engine bypassed the router in 1 of 1 steps"):
        tiny.generate(llm, tiny.prompts(6), tokens=4)
    take_away()
