"""Every family of models that vLLM runs on a CPU: shared within the budget, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import CarpoolError, parse

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SHARED = {
    "qwen3_moe": ("softmax", True), "qwen2_moe": ("softmax", False), "mixtral": ("softmax", True),
    "olmoe": ("softmax", False), "deepseek_v2": ("softmax", False), "deepseek_v3": ("sigmoid", True),
    "gpt_oss": ("softmax", True), "granitemoe": ("softmax", True), "glm4_moe": ("sigmoid", True),
}  # fmt: skip
REFUSED = {
    "ernie4_5_moe": "does not apply the correction bias",
    "hunyuan_v1_moe": "external routing",
    "qwen3": "no mixture-of-experts layer",
}


def dtype_of(family: str) -> dict[str, str]:
    return {"dtype": "bfloat16"} if family in ("deepseek_v2", "deepseek_v3", "gpt_oss") else {}


@pytest.mark.parametrize("family", SHARED)
def test_shared_within_the_budget(family: str, tmp_path: Path) -> None:
    llm = tiny.engine(tiny.write_model(family, tmp_path), tiny.SHARING, **dtype_of(family))
    host, outcomes = tiny.host(llm), list[Any]()
    assert {(layer.spec.scoring, layer.spec.renormalize) for layer in host.layers} == {SHARED[family]}
    host.step.observer = lambda layer, logits_NE, outcome: outcomes.append(outcome)
    tiny.generate(llm, tiny.prompts(6))
    assert len(outcomes) == 7 * len(host.layers)
    for outcome in outcomes:
        assert len(outcome.routing.ids_NK.unique()) <= tiny.BUDGET
        assert torch.isfinite(outcome.routing.weights_NK).all()
    assert sum(int(outcome.changed_N.sum()) for outcome in outcomes) > 0
    # the identity setting gives what an engine without the plugin gives
    llm.collective_rpc("carpool_set", kwargs={"policy": "xshare(budget=1.0)"})
    stock = tiny.engine(tmp_path, None, **dtype_of(family))
    given = tiny.prompts(4, seed=1)
    assert tiny.generate(llm, given) == tiny.generate(stock, given)
    assert str(host.layers[0].plan) == str(parse("xshare(budget=1.0)").for_serving())


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str, tmp_path: Path) -> None:
    """The engine does not come up; without the key it does, dense models included."""
    folder = tiny.write_model(family, tmp_path)
    stock = tiny.engine(folder, None)
    assert len(tiny.generate(stock, tiny.prompts(1))) == 1
    with pytest.raises(CarpoolError, match=REFUSED[family]):
        tiny.engine(folder, tiny.SHARING)
