"""From documents to the token sequences of a calibration."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carpool.artefacts.statistics import MIN_TOKENS
from carpool.artefacts.texts import Document
from carpool.errors import CarpoolError

PIECE = 8  # characters of a piece of text per token of a sequence


class Windows(NamedTuple):
    """Token sequences and the domain of each."""

    ids_BT: Tensor
    domains: tuple[str, ...]


def token_sequences(documents: Sequence[Document], tokenizer: Any, tokens: int, sequence: int, seed: int) -> Windows:
    """Ids `[B, T]` of `ceil(tokens / T)` full sequences, the same number from every domain as far as its text goes.

    Documents are cut into pieces, shuffled by `seed`, and packed with an end-of-text token between them, so that
    every token is real (no padding) and long documents are sampled all over. Each sequence starts as the model's
    inputs do (with a begin token where the tokenizer puts one).

    Args:
        tokens: tokens wanted; text that ends earlier gives fewer.
        sequence: `T`, tokens per sequence.

    Raises:
        CarpoolError: numbers out of range, or less text than `MIN_TOKENS` tokens in full sequences.
    """
    if sequence < 8:
        raise CarpoolError(f"a sequence of {sequence} tokens is too short to calibrate on; use 8 or more")
    if tokens < MIN_TOKENS:
        raise CarpoolError(f"{tokens} tokens are too few to calibrate on; use {MIN_TOKENS} or more")
    wanted = -(-tokens // sequence)
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.domain, []).append(document.text)
    streams = {
        domain: _windows(texts[domain], tokenizer, sequence, random.Random(f"{seed} {domain}")) for domain in texts
    }
    windows: list[tuple[list[int], str]] = []
    while streams and len(windows) < wanted:
        for domain in list(streams):
            window = next(streams[domain], None)
            if window is None:
                del streams[domain]
            elif len(windows) < wanted:
                windows.append((window, domain))
    if len(windows) * sequence < MIN_TOKENS:
        raise CarpoolError(
            f"the text gives {len(windows)} full sequences of {sequence} tokens, at least {MIN_TOKENS} tokens are "
            "needed: give more text, or shorter sequences"
        )
    ids, domains = zip(*windows, strict=True)
    return Windows(torch.tensor(ids), domains)


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
