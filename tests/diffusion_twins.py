"""Slow twins of block diffusion: one request at a time, the whole text recomputed in every forward, no cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carpool.routing.batch import Batch


def block_causal(length: int, block: int, dtype: torch.dtype) -> Tensor:
    """Additive mask `[1, 1, T, T]`, entry by entry."""
    mask_TT = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype)
    for query in range(length):
        for key in range(length):
            if key // block <= query // block:
                mask_TT[query, key] = 0
    return mask_TT[None, None]


def last_block_logits(model: Any, tokens: list[int], block: int, run: Any = None, *, shared: bool = False) -> Tensor:
    """Logits `[L, V]` of the last block of a text, all of which is computed anew.

    Under a run every block is a group of its own; all but the last are exempt unless `shared`.
    """
    ids_1T = torch.tensor([tokens])
    number_T = torch.arange(len(tokens)) // block
    last = int(number_T[-1])
    if run is not None:
        exempt_T = (number_T < last) & (not shared)
        run.batch = Batch.of(len(tokens), group_N=number_T, num_groups=last + 1, exempt_N=exempt_T)
    with torch.inference_mode():
        logits_1TV = model(
            input_ids=ids_1T, attention_mask=block_causal(len(tokens), block, model.dtype), use_cache=False
        ).logits
    return logits_1TV[0, -block:]


def decode(
    model: Any, prompt: list[int], *, block: int, mask: int, threshold: float, max_new: int, steps: int | None = None,
    ends: tuple[int, ...] = (), run: Any = None, shared: bool = False,
) -> tuple[list[int], list[list[int]]]:  # fmt: skip
    """New tokens, and the positions accepted in every forward."""
    steps = block if steps is None else steps
    text, made, accepted = list(prompt), 0, []
    while True:
        start = len(text) // block * block
        given = text[start:]
        current = given + [mask] * (block - len(given))
        for step in range(steps):
            if mask not in current:
                break
            logits_LV = last_block_logits(model, text[:start] + current, block, run, shared=shared)
            logits_LV = logits_LV.clone()
            logits_LV[:, mask] = -torch.inf
            probabilities_LV = logits_LV.softmax(-1)
            found = []
            for position, token in enumerate(current):
                if token == mask:
                    best = int(probabilities_LV[position].argmax())
                    found.append((float(probabilities_LV[position, best]), position, best))
            least = block // steps + (1 if step < block % steps else 0)
            sure = [one for one in found if one[0] > threshold]
            if len(sure) < least:
                sure = sorted(found, key=lambda one: (-one[0], one[1]))[:least]
            for _, position, token in sure:
                current[position] = token
            accepted.append(sorted(start + position for _, position, _ in sure))
        text = text[:start] + current
        made = len(text) - len(prompt)
        new = current[len(given) :]
        if made >= max_new or any(token in ends for token in new):
            break
    tokens = text[len(prompt) :][:max_new]
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1], accepted
    return tokens, accepted
