"""Does lockstep evaluation compute what decoding computes? Compares it with real decoding, token by token.

The decoding side feeds one position of every sequence at a time through a KV cache under `share`, which reads the
rows from the model's own arguments as in any generation. Shapes as in `carpool.evaluate.lockstep`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.evaluate.layout import Layout
from carpool.plans.pipeline import Outcome
from carpool.plans.policy_file import AnyPlan, stats_for
from carpool.routing.batch import Batch


@dataclass(frozen=True)
class Agreement:
    """Lockstep against decoding, for one plan and precision.

    Attributes:
        policy, group, batch, tokens, dtype: what was compared (decoded tokens).
        max_error: largest difference of a logit.
        mean_kl: KL(decoding || lockstep), nats a token.
        flips: (row, layer) pairs whose experts differ, of `pairs`. A score within rounding of another may fall on
            either side, and one such flip moves everything after it in its batch.
    """

    policy: str
    group: str
    batch: int
    tokens: int
    dtype: str
    max_error: float
    mean_kl: float
    flips: int
    pairs: int


def check_lockstep(model: Any, plan: AnyPlan, ids_ST: Tensor, layout: Layout, *, stats: Any = None) -> Agreement:
    """Evaluate one batch both ways, in the model's precision.

    Args:
        ids_ST: inputs of one batch, int64 `[B, T]`.

    Raises:
        CarpoolError: what `share` raises.
    """
    stats = stats_for(plan, stats)
    lockstep_RV, lockstep_LNE = _lockstep(model, plan, ids_ST, layout, stats)
    decoded_RV, decoded_LNE = _decode(model, plan, ids_ST, layout, stats)
    p_RV, q_RV = decoded_RV.double().log_softmax(-1), lockstep_RV.double().log_softmax(-1)
    return Agreement(
        policy=str(plan),
        group=str(layout.grouping),
        batch=layout.batch_size,
        tokens=len(decoded_RV),
        dtype=str(decoded_RV.dtype).removeprefix("torch."),
        max_error=float((lockstep_RV - decoded_RV).abs().amax()),
        mean_kl=float((p_RV.exp() * (p_RV - q_RV)).sum(-1).mean()),
        flips=int((lockstep_LNE != decoded_LNE).any(-1).sum()),
        pairs=lockstep_LNE.shape[0] * lockstep_LNE.shape[1],
    )


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """The model in float64 for the length of a block, then back in its own dtype (lossless: float64 holds it)."""
    dtype, implementation = model.dtype, getattr(model.config, "_experts_implementation", None)
    model.double()
    if implementation is not None:
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    try:
        yield
    finally:
        model.to(dtype)
        if implementation is not None:
            model.set_experts_implementation(implementation)


def _lockstep(model: Any, plan: AnyPlan, ids_ST: Tensor, layout: Layout, stats: Any) -> tuple[Tensor, Tensor]:
    """Logits `[R, V]` and the experts read `[L, R, E]`, rows by sequence and position."""
    from carpool.hosts.transformers import share

    read: dict[int, Tensor] = {}

    def observe(layer: int, batch: Batch, outcome: Outcome) -> None:
        by_position = outcome.computed_NE.unflatten(0, (layout.batch_size, layout.positions))
        read[layer] = by_position[:, layout.prefill :].flatten(0, 1)

    batch = layout.batch(1, ids_ST.device)
    with torch.inference_mode(), share(model, plan, group=layout.grouping, stats=stats, batch=batch, observe=observe):
        logits_RV = layout.logits(model, ids_ST)
    return logits_RV, torch.stack([read[layer] for layer in sorted(read)])


def _decode(model: Any, plan: AnyPlan, ids_ST: Tensor, layout: Layout, stats: Any) -> tuple[Tensor, Tensor]:
    """The same by decoding `stride` positions at a time after one pass over the prompts."""
    from carpool.hosts.transformers import Known, share

    read: dict[int, list[Tensor]] = {}
    logits: list[Tensor] = []

    def observe(layer: int, batch: Batch, outcome: Outcome) -> None:
        read.setdefault(layer, []).append(outcome.computed_NE.unflatten(0, (layout.batch_size, -1)))

    settings = {"group": layout.grouping, "stats": stats, "observe": observe}
    with torch.inference_mode(), share(model, plan, **settings) as run:
        run.known = Known(finished=False, prompt=layout.samples)  # every row of a text votes, whatever its token
        cache = model(input_ids=ids_ST[:, : layout.prefill], use_cache=True).past_key_values
        read.clear()
        if layout.stride > 1:  # several positions a pass look like a prompt, so say who they are
            groups_G = torch.arange(layout.groups, device=ids_ST.device)
            rows_N = groups_G.repeat_interleave(layout.batch_size // layout.groups * layout.stride)
            run.batch = Batch.of(len(rows_N), device=ids_ST.device, group_N=rows_N, num_groups=layout.groups)
        for position in range(layout.prefill, layout.positions, layout.stride):
            fed = ids_ST[:, position : position + layout.stride]
            logits.append(model(input_ids=fed, past_key_values=cache, use_cache=True).logits)
    experts = [torch.cat(read[layer], dim=1).flatten(0, 1) for layer in sorted(read)]
    return torch.cat(logits, dim=1).flatten(0, 1), torch.stack(experts)
