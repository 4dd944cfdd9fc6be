"""Which positions of a forward stand for a token: read from its attention mask and its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError

CACHES = ("past_key_values", "cache_params")
FULL = "full_attention"


def cached_tokens(kwargs: Mapping[str, Any]) -> int | Tensor | None:
    """Tokens of each sequence that the cache holds, padding included: a number, or (static caches) a 0-d tensor, which
    nobody waits for here. None: there is no cache.

    Raises:
        CarpoolError: a cache that does not say.
    """
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if cache is None:
        return None
    if not hasattr(cache, "get_seq_length"):
        raise CarpoolError(
            f"a cache of the type {type(cache).__name__} does not say how many tokens it holds; use one of "
            "transformers' caches, or set run.batch"
        )
    length: int | Tensor = cache.get_seq_length()
    return length


def real_rows(mask: Any, past: int | Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """Positions `[B, S]` that stand for a token, from a padding mask `[B, L]` or attention masks `[B, 1, S, L]`.

    Args:
        mask: of the forward; None: all are real. Of several, by kind of layer, that of full attention.
        past: of `cached_tokens`. The mask may go beyond the last token, as with a static cache.

    Raises:
        CarpoolError: a mask from which it cannot be known.
    """
    if isinstance(mask, Mapping):
        masks = [one for kind, one in mask.items() if isinstance(one, Tensor) and kind == FULL]
        mask = next(iter([*masks, *(one for one in mask.values() if isinstance(one, Tensor))]), None)
    if not isinstance(mask, Tensor):
        return torch.ones(B, S, dtype=torch.bool, device=device)
    if mask.ndim != 2:
        # a padding row may look at nothing; additive masks hold 0 where a row may look
        seen = mask if mask.dtype == torch.bool else mask == 0
        return _seeing(seen.any(1), S).expand(B, S)
    L = mask.shape[1]
    if past is None and L != S:
        raise CarpoolError(
            f"an attention mask of {L} columns for {S} tokens and no cache: which columns are theirs cannot be known; "
            "pass the cache, or set run.batch"
        )
    if not isinstance(past, Tensor):
        past = past or 0
        if past + S > L:
            raise CarpoolError(
                f"an attention mask of {L} columns for {past} cached tokens and {S} more; pass one for all of them"
            )
        return mask[:, past : past + S].bool()
    column_S = (past.to(device) + torch.arange(S, device=device)).clamp(max=L - 1)
    return mask.index_select(1, column_S.reshape(-1)).bool()


def _seeing(seen_BSL: Tensor, S: int) -> Tensor:
    """Rows that look at something. One that looks at itself alone begins a sequence, or is padding that was given
    something to look at: two of a kind in one request cannot be told apart."""
    if S > 1 and not torch.compiler.is_compiling() and bool(((seen_BSL.sum(-1) == 1).sum(-1) > 1).any()):
        raise CarpoolError(
            "the attention mask has several rows of one sequence that look at one position alone: padding, or the "
            "beginnings of several requests; pass a padding mask [B, L], or set run.batch"
        )
    return seen_BSL.any(-1)
