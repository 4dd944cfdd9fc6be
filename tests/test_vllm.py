"""The plugin inside the real engine: off is stock, on is bounded at every step, and what ran is what the core says."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm_models as tiny

import carpool
from carpool import Batch, CarpoolError, Routing

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm
BUDGET, POLICY = tiny.BUDGET, tiny.POLICY


@pytest.fixture
def stock() -> Any:
    """The engine with the plugin loaded and not configured."""
    return tiny.stock_engine()


@pytest.fixture
def shared() -> Iterator[Any]:
    """The engine with a policy, as it was when it started."""
    llm = tiny.shared_engine()
    yield llm
    tiny.host(llm).step.observer = None
    llm.collective_rpc("carpool_set", kwargs={"policy": POLICY, "enabled": True})
    llm.collective_rpc("carpool_report", kwargs={"reset": True})


def test_loaded_but_not_configured_is_stock(stock: Any) -> None:
    from carpool.hosts.vllm.arm import PLACES

    places = [(getattr(importlib.import_module(module), owner), name) for module, owner, name, _ in PLACES]
    assert len(places) == 5
    armed = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, armed, strict=True):
        setattr(owner, name, function.carpool_original)
    try:
        never_loaded = tiny.engine(tiny.qwen3(), None)
    finally:
        for (owner, name), function in zip(places, armed, strict=True):
            setattr(owner, name, function)
    given = tiny.prompts(5, seed=11)
    assert tiny.generate(stock, given) == tiny.generate(never_loaded, given)
    assert "carpool" not in vars(stock.llm_engine.model_executor.driver_worker.worker)
    assert not {"_model_forward", "prepare_inputs", "execute_model"} & set(vars(tiny.runner(stock)))


def test_nothing_stays_patched_beside_a_configured_engine(shared: Any, stock: Any) -> None:
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    assert layer.create_fused_moe_router.__module__.startswith("vllm.")
    kinds = {
        name: {type(m.router).__name__ for m in tiny.runner(llm).get_model().modules() if isinstance(m, MoERunner)}
        for name, llm in (("stock", stock), ("shared", shared))
    }
    assert kinds == {"stock": {"CPURouter"}, "shared": {"SharedCPURouter"}}
    # part of the hash of compiled graphs, so that none traced without the plugin is taken with it
    assert "carpool_version" in tiny.runner(shared).vllm_config.additional_config
    assert tiny.runner(stock).vllm_config.additional_config == {}


def test_every_decode_step_stays_within_the_budget(shared: Any, stock: Any) -> None:
    calls = tiny.watch(shared)
    given = tiny.prompts(6)
    results = tiny.generate(shared, given)
    tiny.assert_bounded(calls, BUDGET)
    assert [ids for ids, _ in results] != [ids for ids, _ in tiny.generate(stock, given)]
    # prompts are native, so the first token is stock's
    assert [ids[0] for ids, _ in results] == [ids[0] for ids, _ in tiny.generate(stock, given, tokens=1)]


def test_under_a_floor_every_step_stays_within_budget_and_overflow(shared: Any) -> None:
    """The bound of every row, from what the experts are told and the native weights alone."""
    tau = 0.2
    shared.collective_rpc("carpool_set", kwargs={"policy": f"{POLICY} | floor({tau})"})
    calls = tiny.watch(shared)
    tiny.generate(shared, tiny.prompts(8, seed=13))
    overflow = 0
    for call in calls:
        exempt_NE = call.outcome.inputs.native_NE & (call.batch.exempt_N & call.batch.real_N).unsqueeze(-1)
        routing, native = call.outcome.routing, call.layer.spec.native(call.logits_NE)
        over = int(call.outcome.overflow_SE.sum())
        assert len(routing.ids_NK[call.batch.real_N].unique()) <= BUDGET + over + int(exempt_NE.any(0).sum())
        computed_NE = torch.zeros_like(call.logits_NE, dtype=torch.bool).scatter(-1, routing.ids_NK.long(), True)
        lost_NK = native.weights_NK.masked_fill(computed_NE.gather(-1, native.ids_NK.long()), 0)
        assert (lost_NK.sum(-1) <= tau * native.weights_NK.sum(-1) + 1e-6).all()
        overflow += over
    assert overflow > 0
    assert sum(int(call.outcome.changed_N.sum()) for call in calls) > 0


def test_an_inert_hook_turns_the_check_red(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.hosts.engine import routed

    def inert(plan: Any, spec: Any, logits_NE: torch.Tensor, batch: Batch, **given: Any) -> Any:
        return carpool.route(carpool.parse("xshare(budget=1.0)"), spec, logits_NE, batch, **given)

    monkeypatch.setattr(routed, "route", inert)
    calls = tiny.watch(shared)
    tiny.generate(shared, tiny.prompts(6))
    with pytest.raises(AssertionError):
        tiny.assert_bounded(calls, BUDGET)


def test_experts_receive_what_the_core_computes_from_the_logits(shared: Any) -> None:
    calls, received = tiny.watch(shared), []
    layers = {layer.name: layer for layer in tiny.host(shared).layers}
    runners = [m for m in tiny.runner(shared).get_model().modules() if getattr(m, "layer_name", None) in layers]
    for moe in {id(m): m for m in runners if hasattr(m, "routed_experts")}.values():
        experts = moe.routed_experts

        def record(*args: Any, _forward: Any = experts.forward_modular, **kwargs: Any) -> Any:
            ids_NK = next(
                v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dtype == torch.int32
            )
            received.append(ids_NK.clone())
            return _forward(*args, **kwargs)

        experts.forward_modular = record
    try:
        tiny.generate(shared, tiny.prompts(6, seed=3))
    finally:
        for moe in runners:
            vars(getattr(moe, "routed_experts", moe)).pop("forward_modular", None)
    by_shape = [ids_NK for ids_NK in received if len(ids_NK) == 6]  # the decode steps; the prompts come as 36 rows
    assert len(by_shape) == len(calls) > 0
    for call, ids_NK in zip(calls, by_shape, strict=True):
        native = call.layer.spec.native(call.logits_NE)
        assert torch.equal(native.ids_NK.sort(-1).values, call.outcome.inputs.native_ids_NK.sort(-1).values)
        again = carpool.route(call.layer.plan, call.layer.spec, call.logits_NE, call.batch, stats=call.layer.stats)
        assert torch.equal(again.routing.ids_NK.sort(-1).values, ids_NK.sort(-1).values)
        assert ids_NK.is_contiguous()
        assert ids_NK.min() >= 0


def test_switching_off_and_on_without_restart(shared: Any, stock: Any) -> None:
    given = tiny.prompts(6, seed=4)
    native, before = tiny.generate(stock, given), tiny.generate(shared, given)
    shared.collective_rpc("carpool_set", kwargs={"enabled": False})
    assert tiny.generate(shared, given) == native
    shared.collective_rpc("carpool_set", kwargs={"enabled": True})
    assert tiny.generate(shared, given) == before != native


def test_changing_numbers_and_kind_without_restart(shared: Any, stock: Any) -> None:
    given = tiny.prompts(6, seed=5)
    shared.collective_rpc("carpool_set", kwargs={"policy": "xshare(budget=16)"})
    calls = tiny.watch(shared)
    tiny.generate(shared, given)
    tiny.assert_bounded(calls, 16)
    assert max(int(call.outcome.union_SE.sum()) for call in calls) > BUDGET
    [settings] = shared.collective_rpc("carpool_set", kwargs={"policy": f"oea(k0={tiny.TOP_K})"})
    assert settings["policy"].startswith("oea(k0=4) | decode_only()")
    assert tiny.generate(shared, given) == tiny.generate(stock, given)  # its identity setting


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "xshare(budget=33)"}, "33 of 32 experts"),
        ({"policy": "xsahre(budget=8)"}, "unknown policy"),
        ({"policy": "sere(top=2)"}, "needs the statistics"),
        ({"enabled": "no"}, "give true or false"),
    ],
)
def test_a_refused_change_changes_nothing(shared: Any, given: dict[str, Any], message: str) -> None:
    before = tiny.generate(shared, tiny.prompts(4))
    with pytest.raises(CarpoolError, match=message):
        shared.collective_rpc("carpool_set", kwargs=given)
    assert tiny.generate(shared, tiny.prompts(4)) == before


def test_a_request_can_opt_out(shared: Any, stock: Any) -> None:
    from vllm import SamplingParams

    given = tiny.prompts(6, seed=6)
    native = tiny.generate(stock, given)
    common: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "detokenize": False, "ignore_eos": True}
    out = SamplingParams(**common, extra_args={"carpool": "off"})
    mixed = [out if i % 2 else SamplingParams(**common) for i in range(6)]
    calls = tiny.watch(shared)
    outputs = shared.generate([{"prompt_token_ids": ids} for ids in given], mixed, use_tqdm=False)
    results = [list(output.outputs[0].token_ids) for output in outputs]
    assert [results[i] for i in (1, 3, 5)] == [native[i][0] for i in (1, 3, 5)]
    for call in calls:
        assert call.batch.exempt_N.sum() == 3
        assert not call.outcome.changed_N[call.batch.exempt_N].any()
    tiny.assert_bounded(calls, BUDGET)


def test_the_report_counts_and_resets(shared: Any) -> None:
    shared.collective_rpc("carpool_report", kwargs={"reset": True})
    tiny.generate(shared, tiny.prompts(6, seed=7), tokens=5)
    [report] = shared.collective_rpc("carpool_report", kwargs={"reset": True})
    assert report["enabled"] is True
    assert [layer["layer"] for layer in report["layers"]] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    for layer in report["layers"]:
        assert (layer["calls"], layer["rows"]) == (4, 24)  # the first of five tokens comes from the prompt
        assert 0 < layer["rows_changed"] <= 24
        assert layer["union"] <= 4 * BUDGET < layer["natural_union"]
    [report] = shared.collective_rpc("carpool_report")
    assert all(layer["rows"] == 0 for layer in report["layers"])


def test_metrics_count_what_ran(shared: Any) -> None:
    from prometheus_client import REGISTRY

    def read(name: str) -> float:
        labels = {"model_name": str(tiny.qwen3()), "engine": "0"}
        return REGISTRY.get_sample_value(name, labels) or 0.0

    names = ("carpool_rows_total", "carpool_rows_changed_total", "carpool_experts_read_total")
    shared.collective_rpc("carpool_report", kwargs={"reset": True})
    before = [read(name) for name in names]
    tiny.generate(shared, tiny.prompts(6, seed=8), tokens=5)
    shared.collective_rpc("carpool_report", kwargs={"reset": True})
    rows, changed, read_now = (read(name) - old for name, old in zip(names, before, strict=True))
    assert rows == 2 * 24
    assert 0 < changed <= rows
    assert 0 < read_now <= 2 * 4 * BUDGET
    refusals = read("carpool_refusals_total")
    with pytest.raises(CarpoolError):
        shared.collective_rpc("carpool_set", kwargs={"policy": "nothing()"})
    assert read("carpool_refusals_total") == refusals + 1


def test_lone_and_exempt_steps_are_counted(shared: Any) -> None:
    """So that "every row was alone" differs from "not running"."""
    shared.collective_rpc("carpool_report", kwargs={"reset": True})
    tiny.generate(shared, tiny.prompts(1, seed=9), tokens=5)
    [report] = shared.collective_rpc("carpool_report", kwargs={"reset": True})
    assert report["steps"] == {"passes": 5, "passes_exempt": 1, "passes_alone": 4}
    tiny.generate(shared, tiny.prompts(3, seed=9), tokens=5)
    [report] = shared.collective_rpc("carpool_report", kwargs={"reset": True})
    assert report["steps"] == {"passes": 5, "passes_exempt": 1, "passes_alone": 0}


def test_one_lone_request_is_native(shared: Any, stock: Any) -> None:
    given = tiny.prompts(1, seed=9)
    assert tiny.generate(shared, given) == tiny.generate(stock, given)


def test_two_engines_do_not_share_state(shared: Any, stock: Any) -> None:
    """Grouped by request, a request with one row is alone: the defaults of serving leave it native."""
    by_request = tiny.engine(tiny.qwen3(), {"policy": POLICY, "group": "request"})
    given = tiny.prompts(6, seed=10)
    calls, others = tiny.watch(shared), tiny.watch(by_request)
    native = tiny.generate(stock, given)
    assert tiny.generate(by_request, given) == native
    assert not calls
    assert {call.batch.num_groups for call in others} == {6}
    assert sum(int(call.outcome.changed_N.sum()) for call in others) == 0
    assert tiny.generate(shared, given) != native
    tiny.assert_bounded(calls, BUDGET)


def test_routing_is_a_valid_contract(shared: Any) -> None:
    calls = tiny.watch(shared)
    tiny.generate(shared, tiny.prompts(8, seed=12))
    for call in calls:
        routing: Routing = call.outcome.routing
        assert routing.ids_NK.dtype == torch.int32
        assert int(routing.ids_NK.min()) >= 0
        assert int(routing.ids_NK.max()) < tiny.EXPERTS
        assert torch.allclose(routing.weights_NK.sum(-1), torch.ones(len(routing.weights_NK)), atol=1e-5)
