"""From documents to the token sequences of a calibration."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carpool.artefacts.statistics import MIN_TOKENS
from carpool.artefacts.texts import Document, divide
from carpool.errors import CarpoolError

HELD_OUT = 5  # one sequence in so many measures what was fitted to the others
PIECE = 8  # characters of a piece of text per token of a sequence


class Windows(NamedTuple):
    """Token sequences, the domain of each, and which of them hold text that is in none of the others."""

    ids_BT: Tensor
    domains: tuple[str, ...]
    held_B: Tensor


def token_sequences(
    documents: Sequence[Document], tokenizer: Any, tokens: int, sequence: int, seed: int, hold_out: bool = False
) -> Windows:
    """Ids `[B, T]` of `ceil(tokens / T)` full sequences, the same number from every domain as far as its text goes.

    Documents are cut into pieces, shuffled by `seed`, and packed with an end-of-text token between them, so that
    every token is real (no padding) and long documents are sampled all over. Each sequence starts as the model's
    inputs do (with a begin token where the tokenizer puts one).

    Args:
        tokens: tokens wanted; text that ends earlier gives fewer.
        sequence: `T`, tokens per sequence.
        hold_out: one sequence in `HELD_OUT` comes from documents that no other sequence has a part of, duplicates
            included (`carpool.artefacts.texts.divide`).

    Raises:
        CarpoolError: numbers out of range, less text than `MIN_TOKENS` tokens in full sequences, or none to hold out.
    """
    if sequence < 8:
        raise CarpoolError(f"a sequence of {sequence} tokens is too short to calibrate on; use 8 or more")
    if tokens < MIN_TOKENS:
        raise CarpoolError(f"{tokens} tokens are too few to calibrate on; use {MIN_TOKENS} or more")
    wanted = -(-tokens // sequence)
    kept, held = list(documents), list[Document]()
    if hold_out:
        parts = divide(documents, 1 - 1 / HELD_OUT)
        kept, held = parts.first, parts.second
    streams = _streams(kept, tokenizer, sequence, seed)
    held_streams = _streams(held, tokenizer, sequence, seed)
    windows: list[tuple[list[int], str, bool]] = []
    drawn = 0  # rounds over the domains
    while streams and len(windows) < wanted:
        for domain in list(streams):
            if len(windows) == wanted:
                break
            spare = held_streams.get(domain) if drawn % HELD_OUT == 1 else None
            window = None if spare is None else next(spare, None)
            if window is not None:
                windows.append((window, domain, True))
            elif (window := next(streams[domain], None)) is not None:
                windows.append((window, domain, False))
            else:
                del streams[domain]
        drawn += 1
    if len(windows) * sequence < MIN_TOKENS:
        raise CarpoolError(
            f"the text gives {len(windows)} full sequences of {sequence} tokens, at least {MIN_TOKENS} tokens are "
            "needed: give more text, or shorter sequences"
        )
    ids, domains, held_B = zip(*windows, strict=True)
    if hold_out and len(set(held_B)) == 1:
        raise CarpoolError(
            f"the text gives no sequence of {sequence} tokens to hold out beside {len(windows)} others: give more "
            "text, raise --tokens, or lower --sequence"
        )
    return Windows(torch.tensor(ids, device="cpu"), domains, torch.tensor(held_B, device="cpu"))


def _streams(documents: Sequence[Document], tokenizer: Any, sequence: int, seed: int) -> dict[str, Iterator[list[int]]]:
    """Full sequences by domain."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.domain, []).append(document.text)
    return {domain: _windows(texts[domain], tokenizer, sequence, random.Random(f"{seed} {domain}")) for domain in texts}


def _windows(texts: Sequence[str], tokenizer: Any, sequence: int, order: random.Random) -> Iterator[list[int]]:
    size = PIECE * sequence
    pieces = [(number, start) for number, text in enumerate(texts) for start in range(0, len(text), size)]
    order.shuffle(pieces)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    prefix = [] if begin is None else [token for token in tokenizer("")["input_ids"] if token == begin]
    suffix = [] if end is None else [end]
    buffer = prefix[:]
    for number, start in pieces:
        buffer += tokenizer(texts[number][start : start + size], add_special_tokens=False)["input_ids"] + suffix
        while len(buffer) >= sequence:
            yield buffer[:sequence]
            buffer = prefix + buffer[sequence:]
