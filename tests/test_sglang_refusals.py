"""What the SGLang host refuses of real SGLang's own objects, each with its sentence; no engine starts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_models as tiny
import torch

from carpool import CarpoolError
from carpool.hosts.sglang import arm, configuration, engine

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow  # SGLang takes long to import


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tiny.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def refused(given: dict[str, Any], message: str) -> None:
    from sglang.srt.layers.moe.topk import TopKConfig

    from carpool.hosts.sglang.specs import route_spec

    with pytest.raises(CarpoolError, match=message) as found:
        route_spec(TopKConfig(**({"top_k": 4} | given)), "model.layers.0.mlp")
    print(found.value)


def test_routers_whose_rule_is_not_known() -> None:
    from sglang.srt.layers.moe.topk import SharedExpertsConfig

    refused({"custom_routing_function": print}, r"layers\.0\.mlp uses a routing function of the model's own \(print\)")
    shared = SharedExpertsConfig(num_fused_shared_experts=1)
    refused({"shared_experts": shared}, "appends fused shared experts .*--disable-shared-experts-fusion")
    refused({"sqrtsoftplus_log1p": True}, "a kernel of its own form")
    refused({"fused_gate_packed_ids": True}, "a kernel of its own form")


@pytest.mark.parametrize("name", ["TRITON_KERNEL", "BYPASSED", "PACKED"])
def test_outputs_that_skip_python(name: str) -> None:
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    refused({"output_format": TopKOutputFormat[name]}, f"takes {name} and routes inside its kernels.*such as triton")


def block(**parts: torch.nn.Module) -> Any:
    made = torch.nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def empty(kind: Any) -> Any:
    """An object of a class of SGLang's, of which only the class is asked."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    return made


def test_blocks_that_route_past_every_policy() -> None:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK

    from carpool.hosts.sglang.layers import build_layers, find

    settings: Any = None
    with pytest.raises(CarpoolError, match="Linear has no mixture-of-experts layer"):
        build_layers(torch.nn.Linear(2, 2), settings, torch.device("cpu"))
    lonely = block(mlp=block(experts=empty(FusedMoE), gate=torch.nn.Linear(2, 2)))
    with pytest.raises(CarpoolError, match=r"mlp routes its experts without a TopK of SGLang's \(Linear\)"):
        find(lonely)
    by_blocks = block(mlp=block(experts=empty(FusedMoE), topk=empty(TopK)))
    assert len(find(by_blocks)) == 1
    by_blocks.mlp.use_block_routing = True
    with pytest.raises(CarpoolError, match="chooses experts for whole blocks by itself"):
        find(by_blocks)


def test_versions_that_were_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang

    given: Any = SimpleNamespace(allow_untested_engine=False)
    engine._check_version(given)
    monkeypatch.setattr(sglang, "__version__", "9.9.9")
    with pytest.raises(CarpoolError, match=r"SGLang 9\.9\.9 was not tested .* \"allow_untested_engine\": true"):
        engine._check_version(given)
    engine._check_version(SimpleNamespace(allow_untested_engine=True))


def test_seams_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe import topk

    engine.check_seams()
    monkeypatch.setattr(topk, "select_experts", lambda hidden_states, router_logits: None)
    with pytest.raises(CarpoolError, match="select_experts of this SGLang has no parameter 'topk_config'"):
        engine.check_seams()


def test_what_sglang_swallows_still_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs an error of a plugin, and a hook without a target, and goes on without."""
    monkeypatch.setattr(arm, "_missing", [])
    arm.around("sglang.srt.server_args.ServerArgs.gone", print)
    with pytest.raises(CarpoolError, match=r"has no sglang\.srt\.server_args\.ServerArgs\.gone"):
        arm.apply()
    monkeypatch.setattr(arm, "_missing", ["sglang.srt.server_args.ServerArgs.resolve_once"])
    monkeypatch.setattr(arm, "around", lambda target, hook: None)
    arm.arm()  # nobody asked for it
    monkeypatch.setattr(sys, "argv", ["sglang", f"--{configuration.PLACE.replace('_', '-')}", "{}"])
    with pytest.raises(SystemExit, match=r"carpool: this SGLang has no .*resolve_once"):
        arm.arm()


def test_switched_off_it_hooks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked: list[str] = []
    monkeypatch.setattr(arm, "around", lambda target, hook: hooked.append(target))
    arm.arm()
    assert hooked
    hooked.clear()
    monkeypatch.setenv("CARPOOL_DISABLE", "1")
    arm.arm()
    assert not hooked
