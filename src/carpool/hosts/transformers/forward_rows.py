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
from carpool.hosts.transformers.known import Known
from carpool.hosts.transformers.masks import cached_tokens, real_rows
from carpool.routing.batch import Batch, Grouping


@dataclass(frozen=True)
class RowRules:
    """How rows are read.

    Attributes:
        grouping: which rows share a coreset.
        exempt_prefill: rows of a prompt keep native routing.
        endings: tokens that `generate` feeds sequences which have ended; empty where it does not matter who votes. A
            loop of one's own that feeds one of them has to say what it means.
    """

    grouping: Grouping
    exempt_prefill: bool = True
    endings: tuple[int, ...] = ()


def build_batch(rules: RowRules, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Known | None = None) -> Batch:
    """The batch of one forward of a transformers model.

    With the grouping `position`, a pass over several positions stands for as many decoding steps, one a position
    (teacher forcing): nothing in it is a prompt.

    Args:
        rules: how rows are read.
        args, kwargs: of the forward.
        known: what the loop knows of its rows.

    Raises:
        CarpoolError: the forward was given neither token ids nor embeddings, cannot be grouped as asked, or does not
            say who its rows are.
    """
    known = Known() if known is None else known
    canvas = kwargs.get("decoder_input_ids")
    if isinstance(canvas, Tensor):
        return _canvases(rules, canvas, known)
    tokens, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    shaped = embeds if tokens is None else tokens
    if not isinstance(shaped, Tensor):
        raise CarpoolError("a forward without input_ids or inputs_embeds; set run.batch to say who its rows are")
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None and shaped.shape[0] == 1:
        return _packed(rules, shaped.shape[1], ends, kwargs.get("position_ids"), known)
    return _padded(rules, tokens, shaped.shape[0], shaped.shape[1], shaped.device, kwargs, known)


def has_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Do the arguments of a forward say what its rows are?"""
    given = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids")))
    return any(isinstance(one, Tensor) for one in given)


def _padded(
    rules: RowRules,
    tokens: Tensor | None,
    B: int,
    S: int,
    device: torch.device,
    kwargs: Mapping[str, Any],
    known: Known,
) -> Batch:
    column_N = torch.arange(S, device=device).repeat(B)
    request_N = torch.arange(B, device=device).repeat_interleave(S)
    past = cached_tokens(kwargs)
    given: dict[str, Any] = {"real_N": real_rows(kwargs.get("attention_mask"), past, B, S, device).reshape(-1)}
    given |= {"request_N": request_N, "num_requests": B}
    finished_B = known.finished_B(B, device)
    if finished_B is not None:
        given["voter_N"] = ~finished_B[request_N]
    if rules.grouping.kind == "position":
        given["prefill_N"] = torch.zeros_like(request_N, dtype=torch.bool)
        given |= {"group_N": column_N, "num_groups": S, "step_N": column_N, "num_steps": S}
        return _finish(rules, B * S, device, given)
    begins = True if S > 1 or past is None else past == 0
    if S == 1 and B > 1 and known.finished is None and known.prefill is None and tokens is not None:
        _refuse_endings(rules, tokens, begins)
    given["prefill_N"] = known.prefill_N(request_N, column_N, B, begins)
    given |= groups_of(rules.grouping, request_N, B, _positions(kwargs, B, S, column_N, past), S, known)
    return _finish(rules, B * S, device, given)


def _refuse_endings(rules: RowRules, tokens_B1: Tensor, begins: Tensor | bool) -> None:
    if not rules.endings or torch.compiler.is_compiling() or begins:
        return
    endings = torch.tensor(rules.endings, device=tokens_B1.device)
    fed = torch.isin(tokens_B1, endings).flatten().nonzero().flatten().tolist()
    if fed:
        raise CarpoolError(
            f"sequence {fed[0]} is fed token {int(tokens_B1[fed[0], 0])}, as sequences are that have ended: whether it "
            "has is for the loop to say, by run.known = Known(finished=...) (False: none has)"
        )


def _canvases(rules: RowRules, canvas_BS: Tensor, known: Known) -> Batch:
    """Rows of canvases: all are real, none is a prompt, and blocks are counted from the start of the canvas.

    A finished canvas has no vote, and its output is thrown away. In a group of its own it would have nobody to choose
    for it and read what it likes; so it rides in the group of the first request that is not finished.
    """
    if rules.grouping.kind == "position":
        raise CarpoolError("a denoising pass is one step for all positions; group by 'request', 'block:n' or 'batch'")
    (B, S), device = canvas_BS.shape, canvas_BS.device
    request_B = torch.arange(B, device=device)
    given: dict[str, Any] = {"request_N": request_B.repeat_interleave(S), "num_requests": B}
    seat_B, finished_B = request_B, known.finished_B(B, device)
    if finished_B is not None:
        given["voter_N"] = ~finished_B.repeat_interleave(S)
        seat_B = torch.where(finished_B, (~finished_B).to(torch.int8).argmax(), request_B)
    positions_N = torch.arange(S, device=device).repeat(B)
    given |= groups_of(rules.grouping, seat_B.repeat_interleave(S), B, positions_N, S, known)
    return Batch.of(B * S, device=device, prefill_N=torch.zeros(B * S, dtype=torch.bool, device=device), **given)


def _packed(rules: RowRules, N: int, ends: Tensor, position_ids: Tensor | None, known: Known) -> Batch:
    row_N = torch.arange(N, device=ends.device)
    ends, requests = ends.to(torch.int64), len(ends) - 1
    request_N = torch.searchsorted(ends[1:].contiguous(), row_N, right=True).clamp(max=requests - 1)
    positions_N = row_N if position_ids is None else position_ids.reshape(-1, N)[0]
    several_N = ends.diff()[request_N] > 1
    prefill_N = several_N if known.prefill is None else known.prefill_N(request_N, positions_N, requests, False)
    given: dict[str, Any] = {"real_N": row_N < ends[-1], "prefill_N": prefill_N}
    given |= {"request_N": request_N, "num_requests": requests}
    if rules.grouping.kind == "position":
        raise CarpoolError("grouping by position needs rows of equal length, not packed requests; use 'batch'")
    given |= groups_of(rules.grouping, request_N, requests, positions_N, N, known)
    return _finish(rules, N, ends.device, given)


def _finish(rules: RowRules, N: int, device: torch.device, given: dict[str, Any]) -> Batch:
    if rules.exempt_prefill:
        given["exempt_N"] = given["prefill_N"]
    return Batch.of(N, device=device, **given)


def groups_of(
    grouping: Grouping, request_N: Tensor, requests: int, positions_N: Tensor, S: int, known: Known | None = None
) -> dict[str, Any]:
    """Arguments of `Batch.of` for rows of `requests` requests that hold at most `S` consecutive positions each."""
    if grouping.kind == "batch":
        return {}
    if grouping.kind == "tenant":
        raise CarpoolError("a forward of a transformers model does not say whose its rows are; set run.batch")
    if grouping.kind == "prompt":
        prompt_B = (Known() if known is None else known).prompt_B(requests, request_N.device)
        return {"group_N": prompt_B[request_N], "num_groups": requests}
    if grouping.kind == "request":
        return {"group_N": request_N, "num_groups": requests}
    # S consecutive positions touch at most this many blocks, so block numbers modulo it are distinct
    blocks = (S + grouping.block - 2) // grouping.block + 1
    return {"group_N": request_N * blocks + (positions_N // grouping.block) % blocks, "num_groups": requests * blocks}


def _positions(kwargs: Mapping[str, Any], B: int, S: int, column_N: Tensor, past: int | Tensor | None) -> Tensor:
    position_ids = kwargs.get("position_ids")
    if isinstance(position_ids, Tensor):
        # [B, S], [1, S], or [axes, B, S] (multimodal; the first axis is time)
        flat = position_ids[0] if position_ids.ndim == 3 else position_ids
        return flat.expand(B, S).reshape(-1).to(torch.int64)
    return column_N if past is None else column_N + past


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device (layers of one model may lie on several)."""
    if batch.group_N.device == device:
        return batch
    values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    moved: dict[str, Any] = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values}
    return Batch(**moved)
