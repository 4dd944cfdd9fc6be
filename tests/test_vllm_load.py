"""What the plugin checks when a model is loaded: the policy and statistics fit, and nothing bypasses the routers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny

import carpool
from carpool import CarpoolError, Routing

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm
POLICY = tiny.POLICY


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


def fits(given: dict[str, Any]) -> None:
    """The configuration is taken for the model of the shared engine."""
    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.layers import build_layers

    runner, settings = tiny.runner(tiny.shared_engine()), Settings.of({"carpool": {"isolation": "batch"} | given})
    assert settings is not None
    assert len(build_layers(runner.get_model(), settings, runner.vllm_config, torch.device("cpu"))) == 2


def refused(given: dict[str, Any], message: str) -> None:
    """The configuration is refused for the model of the shared engine; checked without starting another one."""
    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.layers import build_layers

    runner, settings = tiny.runner(tiny.shared_engine()), Settings.of({"carpool": {"isolation": "batch"} | given})
    with pytest.raises(CarpoolError, match=message):
        build_layers(runner.get_model(), settings, runner.vllm_config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "xshare(budget=33)"}, "33 of 32 experts"),
        ({"policy": "topk(k=5)"}, "exceeds the model's 4"),
        ({"policy": "xshare(budget=8) | protect([99])"}, "expert 99"),
        ({"policy": "xshare_expert_parallel(budget_per_device=4)"}, "device"),
        ({"policy": "sere(top=2)"}, "needs the statistics 'similarity_frobenius'"),
        ({"policy": "sere(top=2)", "stats": "/nowhere/stats.safetensors"}, "cannot read .*/nowhere/stats"),
    ],
)
def test_a_policy_that_does_not_fit_the_model_is_refused(given: dict[str, Any], message: str) -> None:
    refused(given, message)


def test_dense_models_and_bypassed_routers_are_refused(monkeypatch: pytest.MonkeyPatch, stock: Any) -> None:
    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.layers import build_layers

    runner, settings = tiny.runner(stock), Settings.of({"carpool": tiny.SHARING})
    with pytest.raises(CarpoolError, match="Linear has no mixture-of-experts layer"):
        build_layers(torch.nn.Linear(2, 2), settings, runner.vllm_config, torch.device("cpu"))
    # a router that the factory did not make (here: of an engine without the plugin)
    with pytest.raises(CarpoolError, match=r"layers\.0\.mlp\.experts brings a CPURouter of its own"):
        build_layers(runner.get_model(), settings, runner.vllm_config, torch.device("cpu"))
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    monkeypatch.setattr(MoERunner, "is_monolithic", property(lambda self: True))
    refused(tiny.SHARING, "UnquantizedFusedMoEMethod routes inside its kernel")  # as FlashInfer's MonoMoE would


def test_kernels_that_route_by_themselves_are_kept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs. On CPUs kernels for quantised weights leave routing to Python, but take none whose method they do not
    know."""
    tiny.set_environment()
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
    from vllm.model_executor.layers.fused_moe.experts.trtllm_bf16_moe import TrtLlmBf16ExpertsMonolithic
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.platforms import current_platform

    from carpool.hosts.vllm.router import shared_class

    router: Any = CPURouter(top_k=4, global_num_experts=32)
    native = router.routing_method_type
    router.__class__ = shared_class(CPURouter)
    assert router.routing_method_type == router.kernel_routing_method_type == native
    assert router.supports_monolithic_kernels  # refused by name once the model is loaded
    assert CPUExpertsFp8._supports_routing_method(native, None, None)
    assert not CPUExpertsFp8._supports_routing_method(RoutingMethodType.Unspecified, None, None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert router.kernel_routing_method_type == RoutingMethodType.Unspecified
    assert not router.supports_monolithic_kernels
    assert not TrtLlmBf16ExpertsMonolithic._supports_routing_method(router.routing_method_type, None, None)
    assert TrtLlmBf16ExpertsMonolithic._supports_routing_method(native, None, None)


def test_a_model_that_is_wrapped_in_part_is_refused(shared: Any) -> None:
    """Experts beside those of the routers that Carpool shares, known by the model's own list or by their weights."""
    model = tiny.runner(shared).get_model()
    experts = torch.nn.Module()
    model.mega_experts = experts
    experts.w13_weight = torch.nn.Parameter(torch.zeros(7, 64, 64))  # no number of experts
    model.conv = torch.nn.Conv2d(64, tiny.EXPERTS, 3)  # 32 of something else
    fits(tiny.SHARING)
    experts.w13_weight = torch.nn.Parameter(torch.zeros(tiny.EXPERTS, 64, 64))
    refused(tiny.SHARING, "mega_experts holds experts .* 1 of 3 MoE layers could not share")
    experts.w13_weight = torch.nn.Parameter(torch.zeros(7, 64, 64))
    listed = model.moe_layers
    model.moe_layers = [*listed, experts]
    refused(tiny.SHARING, "mega_experts holds experts .* 1 of 3 MoE layers could not share")
    model.moe_layers = listed
    del model.mega_experts, model.conv


def test_expert_substitution_is_refused(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = tiny.host(shared).layers[1].runner.routed_experts
    monkeypatch.setattr(experts, "expert_substitution", torch.nn.Identity(), raising=False)
    refused(tiny.SHARING, r"layers\.1\.mlp\.experts: constants stand in for some of its experts")


def test_rows_that_are_not_the_batchs_are_refused(shared: Any) -> None:
    from carpool.hosts.vllm.router import routed

    layer = tiny.host(shared).layers[0]
    layer.step.rows.expected = 5
    native = Routing(torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 4))
    with pytest.raises(CarpoolError, match="sees 4 rows of a forward pass of 5"):
        routed(layer, torch.zeros(4, 64), torch.zeros(4, tiny.EXPERTS), native)
    layer.step.rows.clear()


def statistics(path: Path, gates: list[torch.Tensor]) -> Path:
    """A statistics file with made-up similarities for a model with these gates, for an engine that took no sample."""
    from carpool.artefacts.identity import ENTRIES, SAMPLES, fingerprint
    from carpool.artefacts.statistics import Statistics
    from carpool.artefacts.tensor_checks import SIMILARITIES

    generator, layers = torch.Generator().manual_seed(0), {}
    for index in range(len(gates)):
        drawn_EE = torch.rand(tiny.EXPERTS, tiny.EXPERTS, generator=generator)
        similarity_EE = ((drawn_EE + drawn_EE.T) / 2).fill_diagonal_(1.0)
        coverage_E = torch.full((tiny.EXPERTS,), 100, dtype=torch.int64)
        layers[index] = {name: similarity_EE.clone() for name in SIMILARITIES} | {"coverage": coverage_E}
        layers[index] |= {name: torch.zeros(tiny.EXPERTS, ENTRIES, dtype=torch.bfloat16) for name in SAMPLES}
    Statistics(
        layers=layers, fingerprint=fingerprint(enumerate(gates)), architecture="Qwen3MoeForCausalLM",
        num_experts=tiny.EXPERTS, top_k=tiny.TOP_K, hidden_size=64, tokens=1000, seed=0, data=(),
        created="2026-01-01T00:00:00Z", carpool_version=carpool.__version__, torch_version=torch.__version__,
    ).save(path)  # fmt: skip
    return path


def test_sere_with_statistics_of_this_model_and_of_another(tmp_path: Path, shared: Any) -> None:
    from safetensors.torch import load_file

    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.layers import build_layers

    weights = load_file(tiny.qwen3() / "model.safetensors")
    gates = [weights[f"model.layers.{i}.mlp.gate.weight"] for i in range(2)]
    path = statistics(tmp_path / "stats.safetensors", gates)
    other = statistics(tmp_path / "other.safetensors", [gate + 1 for gate in gates])
    refused({"policy": "sere(top=1)", "stats": str(other)}, "of another model")
    runner = tiny.runner(shared)
    settings = Settings.of({"carpool": {"policy": "sere(top=1)", "stats": str(path), "isolation": "batch"}})
    layers = build_layers(runner.get_model(), settings, runner.vllm_config, torch.device("cpu"))
    calls, host = tiny.watch(shared), tiny.host(shared)
    for layer, loaded in zip(host.layers, layers, strict=True):
        layer.statistics = loaded.statistics
    shared.collective_rpc("carpool_set", kwargs={"policy": "sere(top=1)"})
    tiny.generate(shared, tiny.prompts(6))
    tiny.assert_bounded(calls, 6)  # six requests, one primary each
    for layer in host.layers:
        layer.statistics = {}
