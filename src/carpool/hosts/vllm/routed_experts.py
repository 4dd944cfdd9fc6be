"""A trace of what vLLM says of its requests (`enable_return_routed_experts`): which experts each token chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from carpool.artefacts.trace import Trace
from carpool.artefacts.trace_facts import TraceFacts
from carpool.errors import CarpoolError


def trace_of(
    outputs: Sequence[Any], num_experts: int, layers: Sequence[int] | None = None, architecture: str = "vLLM"
) -> Trace:
    """The trace of finished requests, one for each sample.

    vLLM does not say which requests ran together nor how much experts weighed. Steps are as if all requests had begun
    at once: all prompts are one, then every decoded token is one. Tokens that vLLM does not report, such as the last
    one, are left out.

    Args:
        outputs: of `LLM.generate`. num_experts: `E`. layers: numbers of the MoE layers; default: from 0.
        architecture: name of the model's class.

    Raises:
        CarpoolError: a request without routed experts, or with fewer than its prompt has tokens.
    """
    experts, phases, steps, requests, positions = [], [], [], [], []
    samples = [(one, sample) for one in outputs for sample in one.outputs]
    for request, (one, sample) in enumerate(samples):
        if sample.routed_experts is None:
            raise CarpoolError(
                f"request {one.request_id} says nothing of its experts; start vLLM with "
                "enable_return_routed_experts=True"
            )
        rows_TLK, prompt = torch.as_tensor(sample.routed_experts), len(one.prompt_token_ids)
        if rows_TLK.dim() != 3 or len(rows_TLK) < prompt:
            raise CarpoolError(
                f"request {one.request_id} has experts of {len(rows_TLK)} tokens and a prompt of {prompt}; leave "
                "routed_experts_prompt_start at 0"
            )
        place_T = torch.arange(len(rows_TLK))
        experts.append(rows_TLK.long())
        positions.append(place_T)
        phases.append(place_T >= prompt)
        steps.append((place_T - prompt + 1).clamp_min(0))
        requests.append(torch.full_like(place_T, request))
    if not samples:
        raise CarpoolError("no request, no trace: give the outputs of LLM.generate")
    step_T = torch.cat(steps)
    order_T = step_T.sort(stable=True).indices
    experts_TLK = torch.cat(experts)[order_T]
    named = tuple(range(experts_TLK.shape[1])) if layers is None else tuple(layers)
    facts = TraceFacts(num_experts=num_experts, layers=named, architecture=architecture)
    return Trace.of(
        experts_TLK, facts, step_T=step_T[order_T], request_T=torch.cat(requests)[order_T],
        position_T=torch.cat(positions)[order_T], decode_T=torch.cat(phases)[order_T],
    )  # fmt: skip
