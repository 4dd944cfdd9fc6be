"""Every family of models that vLLM runs on a CPU: shared within the budget, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny
from vllm_coverage import ROUTERS, STORED, cases, measure

import carpool
from carpool import CarpoolError, parse

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]  # the page: docs/results/vllm-coverage.json
SHARED = {
    "qwen3_moe": ("softmax", True), "qwen2_moe": ("softmax", False), "mixtral": ("softmax", True),
    "olmoe": ("softmax", False), "deepseek_v2": ("softmax", False), "deepseek_v3": ("sigmoid", True),
    "gpt_oss": ("softmax", True), "granitemoe": ("softmax", True), "glm4_moe": ("sigmoid", True),
}  # fmt: skip
REFUSED = {
    "ernie4_5_moe": "does not apply the correction bias",
    "llama4_text": "routing function of the model's own",
    "hunyuan_v1_moe": "external routing",
    "qwen3": "no mixture-of-experts layer",
}


def dtype_of(family: str) -> dict[str, str]:
    return {"dtype": "bfloat16"} if family in ("deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text") else {}


@pytest.mark.parametrize("family", SHARED)
def test_shared_within_the_budget(family: str, tmp_path: Path) -> None:
    host = assert_shared(tiny.write_model(family, tmp_path), **dtype_of(family))
    assert {(layer.spec.scoring, layer.spec.renormalize) for layer in host.layers} == {SHARED[family]}


def test_the_reference_model() -> None:
    """Trained routers: 64 experts, 8 a token."""
    model = pytest.importorskip("carpool_demo", reason="the reference model is an extra").MODEL
    host = assert_shared(model)
    assert {(layer.num_experts, layer.spec.top_k) for layer in host.layers} == {(64, 8)}


def assert_shared(folder: Path, **options: Any) -> Any:
    """Every decode step within the budget; off, and with all experts, what an engine without the plugin gives."""
    llm = tiny.engine(folder, tiny.SHARING, **options)
    host, given = tiny.host(llm), tiny.prompts(6)
    calls = tiny.watch(llm)
    shared = tiny.generate(llm, given)
    assert len(calls) == 7 * len(host.layers)
    tiny.assert_bounded(calls, tiny.BUDGET)
    for call in calls:
        assert torch.isfinite(call.outcome.routing.weights_NK).all()
        if options:  # logits of 16 bits tie, and kernels break native ties by rules of their own
            continue
        again = carpool.route(call.layer.plan, call.layer.spec, call.logits_NE, call.batch, stats=call.layer.stats)
        assert torch.equal(again.routing.ids_NK.sort(-1).values, call.outcome.routing.ids_NK.sort(-1).values)
    native = tiny.generate(tiny.engine(folder, None, **options), given)
    assert shared != native
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    assert tiny.generate(llm, given) == native
    llm.collective_rpc("carpool_set", kwargs={"enabled": True, "policy": "xshare(budget=1.0)"})
    assert tiny.generate(llm, given) == native
    assert str(host.layers[0].plan) == str(parse("xshare(budget=1.0)").for_serving())
    return host


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str, tmp_path: Path) -> None:
    """The engine does not come up; without the key it does, dense models included."""
    folder = tiny.write_model(family, tmp_path)
    stock = tiny.engine(folder, None, **dtype_of(family))
    assert len(tiny.generate(stock, tiny.prompts(1))) == 1
    with pytest.raises(CarpoolError, match=REFUSED[family]):  # by its layers
        tiny.engine(folder, tiny.SHARING | {"allow_untested_engine": True}, **dtype_of(family))
    with pytest.raises(CarpoolError, match=r"cannot be shared|no mixture-of-experts layer"):  # before they are loaded
        tiny.engine(folder, tiny.SHARING, **dtype_of(family))


@pytest.mark.parametrize("storage", STORED)
def test_quantised_experts(storage: str, tmp_path: Path) -> None:
    """Shared by the kernel that vLLM has for them here, or in front of a stand-in for it."""
    [case] = [case for case in cases() if case.method is not None and case.storage == storage]
    row = measure(case, tmp_path)
    assert row["result"] in ("shared", ROUTERS), row
    assert row["rows_changed"] > 0
