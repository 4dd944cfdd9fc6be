"""Draws the token sequences of an evaluation from texts: random offsets, no overlap, domains mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from carpool.errors import CarpoolError

FEWER = "take fewer or shorter sequences"


class Document(Protocol):
    """A text and the domain it belongs to."""

    @property
    def domain(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Sequences:
    """Windows of text, any prefix of which is balanced over the domains as far as the texts allow.

    Attributes:
        ids_ST: int64 `[S, T + 1]`: `T` inputs and the last target.
        domain_S: int64, index into `domains`.
        domains: names.
    """

    ids_ST: Tensor
    domain_S: Tensor
    domains: tuple[str, ...]


def draw(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
    fewer: str = FEWER,
) -> Sequences:
    """Draw `count` windows of `length + 1` tokens without overlap.

    Every document is cut into windows from a random offset on; a domain gives one window of each of its documents
    before it gives a second one of any. Domains take turns in random order.

    Args:
        progress: told the characters of every document that is tokenized.
        fewer: what to do, beside adding text, where the texts do not hold so many.

    Raises:
        CarpoolError: the texts do not hold that many windows.
    """
    rng = np.random.default_rng(seed)
    pools: dict[str, list[tuple[int, float, list[int]]]] = {}
    for document in documents:
        pool = pools.setdefault(document.domain, [])
        windows = _windows(_tokenize(tokenizer, document.text), length + 1, rng)
        order = rng.permutation(len(windows))
        pool += [(turn, rng.random(), windows[index]) for turn, index in enumerate(order)]
        if progress:
            progress(len(document.text))
    available = sum(map(len, pools.values()))
    if available < count:
        raise CarpoolError(
            f"the texts hold {available} separate sequences of {length + 1} tokens and {count} are needed: "
            f"add text, or {fewer}"
        )
    domains = tuple(sorted(name for name, pool in pools.items() if pool))
    queues = [sorted(pools[name], reverse=True) for name in domains]
    taken: list[tuple[int, list[int]]] = []
    while len(taken) < count:
        for domain in rng.permutation(len(domains)):
            if queues[domain]:
                taken.append((int(domain), queues[domain].pop()[2]))
    taken = taken[:count]
    used = sorted({domain for domain, _ in taken})
    return Sequences(
        torch.tensor([ids for _, ids in taken]),
        torch.tensor([used.index(domain) for domain, _ in taken]),
        tuple(domains[domain] for domain in used),
    )


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _windows(ids: list[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    if len(ids) < size:
        return []
    first = int(rng.integers(0, min(size, len(ids) - size + 1)))
    return [ids[start : start + size] for start in range(first, len(ids) - size + 1, size)]
