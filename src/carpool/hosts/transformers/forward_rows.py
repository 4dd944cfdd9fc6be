"""Who the rows of a forward pass are, read from the arguments of the model's forward.

A row is a token of the flattened `[B, S]` input. Three layouts: padded (`generate`, plain forwards) with one request
a row of the batch; packed (continuous batching: `B = 1`, requests end to end, `cu_seq_lens_q` has their ends); and
canvases, which a block-diffusion decoder denoises in place (`decoder_input_ids`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.routing.batch import Batch, Grouping


@dataclass(frozen=True)
class RowRules:
    """How rows are read.

    Attributes:
        grouping: which rows share a coreset.
        exempt_prefill: rows of a prompt (more than one query token of a request in one pass) keep native routing.
        pad_token_id: a decoding row that is fed this token belongs to a finished sequence and has no vote.
    """

    grouping: Grouping
    exempt_prefill: bool = True
    pad_token_id: int | None = None


def build_batch(
    rules: RowRules, args: tuple[Any, ...], kwargs: Mapping[str, Any], finished_B: Tensor | None = None
) -> Batch:
    """The batch of one forward of a transformers model, without a host sync.

    With the grouping `position`, a pass over several positions stands for as many decoding steps, one a position
    (teacher forcing): nothing in it is a prompt.

    Args:
        rules: how rows are read.
        args, kwargs: of the forward.
        finished_B: canvases that are computed although their request is done with them; None: there are none.

    Raises:
        CarpoolError: the forward was given neither token ids nor embeddings, or cannot be grouped as asked.
    """
    canvas = kwargs.get("decoder_input_ids")
    if isinstance(canvas, Tensor):
        return _canvases(rules, canvas, finished_B)
    tokens, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    shaped = embeds if tokens is None else tokens
    if not isinstance(shaped, Tensor):
        raise CarpoolError("a forward without input_ids or inputs_embeds; set run.batch to say who its rows are")
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None and shaped.shape[0] == 1:
        return _packed(rules, shaped.shape[1], ends, kwargs.get("position_ids"))
    return _padded(rules, tokens, shaped.shape[0], shaped.shape[1], shaped.device, kwargs)


def has_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Do the arguments of a forward say what its rows are?"""
    given = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids")))
    return any(isinstance(one, Tensor) for one in given)


def _padded(
    rules: RowRules, tokens: Tensor | None, B: int, S: int, device: torch.device, kwargs: Mapping[str, Any]
) -> Batch:
    column_N = torch.arange(S, device=device).repeat(B)
    request_N = torch.arange(B, device=device).repeat_interleave(S)
    given: dict[str, Any] = {"real_N": _real(kwargs.get("attention_mask"), B, S, device).reshape(-1)}
    given |= {"request_N": request_N, "num_requests": B}
    if S == 1 and tokens is not None and rules.pad_token_id is not None:
        given["voter_N"] = tokens.reshape(-1) != rules.pad_token_id
    prompt = S > 1 and rules.grouping.kind != "position"
    given["prefill_N"] = torch.full_like(request_N, prompt, dtype=torch.bool)
    if rules.grouping.kind == "position":
        given |= {"group_N": column_N, "num_groups": S, "step_N": column_N, "num_steps": S}
    else:
        positions_N = _positions(kwargs, B, S, column_N)
        given |= groups_of(rules.grouping, request_N, B, positions_N, S)
    return _finish(rules, B * S, device, given)


def _canvases(rules: RowRules, canvas_BS: Tensor, finished_B: Tensor | None) -> Batch:
    """Rows of canvases: all are real, none is a prompt, and blocks are counted from the start of the canvas.

    A finished canvas has no vote, and its output is thrown away. In a group of its own it would have nobody to choose
    for it and read what it likes; so it rides in the group of the first request that is not finished.
    """
    if rules.grouping.kind == "position":
        raise CarpoolError("a denoising pass is one step for all positions; group by 'request', 'block:n' or 'batch'")
    (B, S), device = canvas_BS.shape, canvas_BS.device
    request_B = torch.arange(B, device=device)
    given: dict[str, Any] = {"request_N": request_B.repeat_interleave(S), "num_requests": B}
    seat_B = request_B
    if finished_B is not None:
        given["voter_N"] = ~finished_B.repeat_interleave(S)
        seat_B = torch.where(finished_B, (~finished_B).to(torch.int8).argmax(), request_B)
    given |= groups_of(rules.grouping, seat_B.repeat_interleave(S), B, torch.arange(S, device=device).repeat(B), S)
    return Batch.of(B * S, device=device, prefill_N=torch.zeros(B * S, dtype=torch.bool, device=device), **given)


def _packed(rules: RowRules, N: int, ends: Tensor, position_ids: Tensor | None) -> Batch:
    row_N = torch.arange(N, device=ends.device)
    ends = ends.to(torch.int64)
    request_N = torch.searchsorted(ends[1:].contiguous(), row_N, right=True).clamp(max=len(ends) - 2)
    given: dict[str, Any] = {"real_N": row_N < ends[-1], "prefill_N": ends.diff()[request_N] > 1}
    given |= {"request_N": request_N, "num_requests": len(ends) - 1}
    positions_N = row_N if position_ids is None else position_ids.reshape(-1, N)[0]
    if rules.grouping.kind == "position":
        raise CarpoolError("grouping by position needs rows of equal length, not packed requests; use 'batch'")
    given |= groups_of(rules.grouping, request_N, len(ends) - 1, positions_N, N)
    return _finish(rules, N, ends.device, given)


def _finish(rules: RowRules, N: int, device: torch.device, given: dict[str, Any]) -> Batch:
    if rules.exempt_prefill:
        given["exempt_N"] = given["prefill_N"]
    return Batch.of(N, device=device, **given)


def groups_of(grouping: Grouping, request_N: Tensor, requests: int, positions_N: Tensor, S: int) -> dict[str, Any]:
    """Arguments of `Batch.of` for rows of `requests` requests that hold at most `S` consecutive positions each."""
    if grouping.kind == "batch":
        return {}
    if grouping.kind in ("tenant", "prompt"):
        raise CarpoolError(
            f"group={str(grouping)!r}: a forward of a transformers model does not say whose its rows are; set run.batch"
        )
    if grouping.kind == "request":
        return {"group_N": request_N, "num_groups": requests}
    # S consecutive positions touch at most this many blocks, so block numbers modulo it are distinct
    blocks = (S + grouping.block - 2) // grouping.block + 1
    return {"group_N": request_N * blocks + (positions_N // grouping.block) % blocks, "num_groups": requests * blocks}


def _positions(kwargs: Mapping[str, Any], B: int, S: int, column_N: Tensor) -> Tensor:
    position_ids, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
    if isinstance(position_ids, Tensor):
        # [B, S], [1, S], or [axes, B, S] (multimodal; the first axis is time)
        flat = position_ids[0] if position_ids.ndim == 3 else position_ids
        return flat.expand(B, S).reshape(-1).to(torch.int64)
    return column_N if cache is None else column_N + cache.get_seq_length()


def _real(mask: Any, B: int, S: int, device: torch.device) -> Tensor:
    """Rows `[B, S]` that stand for a token, from a padding mask `[B, L]` or attention masks `[B, 1, S, L]`."""
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return torch.ones(B, S, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, -S:].bool()
    # a padding row on the left may look at nothing; additive masks hold 0 where a row may look
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen.any(-1).any(1).expand(B, S)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device (layers of one model may lie on several)."""
    if batch.group_N.device == device:
        return batch
    values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    moved: dict[str, Any] = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values}
    return Batch(**moved)
