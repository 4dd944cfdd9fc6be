"""A trace from what vLLM returns of its routing (`LLM(..., enable_return_routed_experts=True)`).

`T` rows, `L` MoE layers, `K` experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from carpool.artefacts.trace import Trace
from carpool.artefacts.trace_facts import TraceFacts
from carpool.errors import CarpoolError


def trace_of(outputs: Sequence[Any], facts: TraceFacts) -> Trace:
    """The trace of one call of `generate`.

    vLLM returns which experts every token chose, without weights and without its steps. The prompts are taken to be one
    step, and the n-th decoded token of every request another: that is what happens to requests which start together and
    fit into the batch.

    Args:
        outputs: of `generate`; the first completion of each request counts.
        facts: number of experts, and which of the layers that vLLM returns are MoE layers.

    Raises:
        CarpoolError: outputs without routing, or with other layers.
    """
    parts = []
    for number, output in enumerate(outputs):
        chosen = getattr(output.outputs[0], "routed_experts", None)
        if chosen is None:
            raise CarpoolError(
                f"request {number} came back without its experts: start vLLM with enable_return_routed_experts=True "
                "(its V2 model runner and prefix caching have to be on)"
            )
        experts_TLK = torch.as_tensor(chosen).long()
        if experts_TLK.dim() != 3 or max(facts.layers, default=0) >= max(experts_TLK.shape[1], 1):
            raise CarpoolError(
                f"request {number} has experts of shape {list(experts_TLK.shape)}, which has no layer "
                f"{max(facts.layers, default=0)}: name the layers that vLLM returns"
            )
        position_T, prompt = torch.arange(len(experts_TLK)), len(output.prompt_token_ids)
        step_T = (position_T - prompt + 1).clamp_min(0)
        request_T = torch.full_like(position_T, number)
        parts.append((experts_TLK[:, list(facts.layers)], step_T, request_T, position_T, position_T >= prompt))
    if not parts:
        raise CarpoolError("no request came back, so that there is nothing to trace")
    experts_TLK, step_T, request_T, position_T, decode_T = (torch.cat(part) for part in zip(*parts, strict=True))
    order_T = step_T.argsort(stable=True)
    return Trace.of(
        experts_TLK[order_T], facts, step_T=step_T[order_T], request_T=request_T[order_T],
        position_T=position_T[order_T], decode_T=decode_T[order_T],
    )  # fmt: skip
