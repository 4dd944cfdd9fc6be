"""Adapters (LoRA) beside sharing: prompts native, decoding within the budget, whoever brings an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def adapter(folder: Path) -> Path:
    """Of the query projections."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, 64, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, 8, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_requests_with_and_without_an_adapter_share_within_the_budget(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = tiny.engine(tiny.qwen3(), tiny.SHARING, enable_lora=True, max_lora_rank=8)
    one = LoRARequest("one", 1, str(adapter(tmp_path)))
    parameters = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": ids} for ids in tiny.prompts(6)]

    def run() -> list[list[int]]:
        requests: list[Any] = [one if i % 2 else None for i in range(6)]
        outputs = llm.generate(given, parameters, use_tqdm=False, lora_request=requests)
        return [list(output.outputs[0].token_ids) for output in outputs]

    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    native, stock = run(), tiny.generate(tiny.stock_engine(), tiny.prompts(6))
    assert [native[i] for i in (0, 2, 4)] == [stock[i][0] for i in (0, 2, 4)]
    assert [native[i] for i in (1, 3, 5)] != [stock[i][0] for i in (1, 3, 5)]  # the adapter does something
    llm.collective_rpc("carpool_set", kwargs={"enabled": True})
    calls = tiny.watch(llm)
    shared = run()
    tiny.host(llm).step.observer = None
    tiny.assert_bounded(calls, tiny.BUDGET)
    assert [ids[0] for ids in shared] == [ids[0] for ids in native]
