"""The same model in a running vLLM and in transformers: decoding side by side, both hosts choose the same experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny
from torch import Tensor

import carpool
from carpool import Batch, Outcome

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
POLICIES = ("xshare(budget=8)", "oea(k0=1)", "des_vote(size=8) | floor(0.3)", "lynx(budget=10)", "topk(k=2)")
ROWS, TOKENS = 6, 8


def in_vllm(llm: Any, policy: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[tiny.Call]]:
    """Greedy tokens, and every layer's call in every decoding step."""
    llm.collective_rpc("carpool_set", kwargs={"policy": policy})
    calls = tiny.watch(llm)
    tokens = [ids for ids, _ in tiny.generate(llm, prompts, tokens=TOKENS)]
    tiny.host(llm).step.observer = None
    return tokens, [call for call in calls if not (call.batch.exempt_N & call.batch.real_N).any()]


def in_transformers(model: Any, policy: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[Outcome]]:
    seen: list[Outcome] = []

    def see(layer: int, batch: Batch, outcome: Outcome) -> None:
        if not batch.exempt_N.any():
            seen.append(outcome)

    ids_BT = torch.tensor(prompts)
    with carpool.share(model, carpool.parse(policy).for_serving(), observe=see):
        made_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return made_BT[:, ids_BT.shape[1] :].tolist(), seen


def weights(outcome: Outcome) -> Tensor:
    """Each row's weight for each expert, float32 `[N, E]`."""
    routing = outcome.routing
    made_NE = torch.zeros(outcome.allowed_NE.shape)
    return made_NE.scatter_add(-1, routing.ids_NK.long(), routing.weights_NK.float())


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_decoding_side_by_side(family: str, tmp_path: Path) -> None:
    """Token for token, in float32. (On CPUs DeepSeek's attention runs in bfloat16 alone, where the engines round
    differently from the first layer on.)"""
    from transformers import AutoModelForCausalLM

    llm = tiny.engine(tiny.write_model(family, tmp_path), tiny.SHARING)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts, changed = tiny.prompts(ROWS, length=6), 0
    for policy in POLICIES:
        their_tokens, calls = in_vllm(llm, policy, prompts)
        my_tokens, mine = in_transformers(model, policy, prompts)
        assert len(calls) == (TOKENS - 1) * len(tiny.host(llm).layers)
        assert my_tokens == their_tokens, policy
        for one, call in zip(mine, calls, strict=True):
            assert torch.equal(one.coreset_GE[0], call.outcome.coreset_GE[0]), policy
            assert torch.equal(one.computed_NE, call.outcome.computed_NE), policy
            assert torch.equal(one.changed_N, call.outcome.changed_N), policy
            torch.testing.assert_close(weights(one), weights(call.outcome), rtol=1e-3, atol=1e-4)
            changed += int(one.changed_N.sum())
    assert changed > len(POLICIES) * TOKENS
