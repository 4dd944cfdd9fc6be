"""Draws the token sequences of an evaluation from texts: random offsets, no overlap, domains mixed, and batches that
share no document, so that what one batch shows does not depend on what another shows."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.evaluate.intervals import FEWEST

FEWER = "take fewer or shorter sequences"
Window = list[int]


class Document(Protocol):
    """A text and the domain it belongs to."""

    @property
    def domain(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Sequences:
    """Windows of text, batch by batch; any prefix of a batch is balanced over the domains as far as its texts allow.

    Attributes:
        ids_ST: int64 `[S, T + 1]`: `T` inputs and the last target.
        domain_S: int64, index into `domains`.
        domains: names.
        batches: equal parts, in order, no two of which hold text of the same document.
    """

    ids_ST: Tensor
    domain_S: Tensor
    domains: tuple[str, ...]
    batches: int = 1


@dataclass(frozen=True)
class Cut:
    """Documents cut into windows of equal length, each from a random offset on.

    Attributes:
        windows: by domain and document, in random order.
        length: inputs of a window.
    """

    windows: dict[str, list[list[Window]]]
    length: int

    @classmethod
    def of(
        cls,
        documents: Iterable[Document],
        tokenizer: Any,
        *,
        length: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Cut:
        """Cut every document into windows of `length + 1` tokens; those that hold none are left out.

        Args:
            progress: told the characters of every document that is tokenized.
        """
        rng = np.random.default_rng(seed)
        found: dict[str, list[list[Window]]] = {}
        for document in documents:
            windows = _windows(_tokenize(tokenizer, document.text), length + 1, rng)
            if windows:
                order = rng.permutation(len(windows))
                found.setdefault(document.domain, []).append([windows[index] for index in order])
            if progress:
                progress(len(document.text))
        return cls(dict(sorted(found.items())), length)

    def most(self, batch_size: int, seed: int) -> int:
        """How many batches without a common document `draw` can fill."""
        sizes = [len(windows) for documents in self.windows.values() for windows in documents]
        low, high = 0, min(len(sizes), sum(sizes) // batch_size)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._dealt(middle, batch_size, seed) is not None else (low, middle - 1)
        return low

    def draw_within(self, least: int, wanted: int, batch_size: int, *, seed: int, fewer: str = FEWER) -> Sequences:
        """So many batches as are wanted, or else as many as the texts hold; raises CarpoolError where they do not hold
        `least`."""
        most = wanted if least == wanted else min(wanted, self.most(batch_size, seed))
        return self.draw(max(least, most), batch_size, seed=seed, fewer=fewer)

    def draw(self, batches: int, batch_size: int, *, seed: int, fewer: str = FEWER) -> Sequences:
        """Draw `batches` batches of `batch_size` windows.

        Every document belongs to one batch. A batch takes one window of each of its documents before it takes a second
        one of any; its domains take turns in random order.

        Args:
            fewer: what to do, beside adding text, where the texts do not hold so many.

        Raises:
            CarpoolError: the texts do not hold that many batches.
        """
        dealt = self._dealt(batches, batch_size, seed)
        if dealt is None:
            most = self.most(batch_size, seed)
            sizes = [len(windows) for documents in self.windows.values() for windows in documents]
            among = f" of {batch_size} that share no document" if batches > 1 else f" of {batch_size}"
            raise CarpoolError(
                f"the texts hold {sum(sizes)} separate sequences of {self.length + 1} tokens in {len(sizes)} "
                f"documents: {most} batches{among}, and {batches} are needed: add text, or {fewer}"
            )
        rng = np.random.default_rng([seed, batches, batch_size])
        taken = [one for queues in dealt for one in _filled(queues, batch_size, rng)]
        names = sorted({domain for domain, _ in taken})
        return Sequences(
            torch.tensor([ids for _, ids in taken]),
            torch.tensor([names.index(domain) for domain, _ in taken]),
            tuple(names),
            batches,
        )

    def _dealt(self, batches: int, batch_size: int, seed: int) -> list[dict[str, list[list[Window]]]] | None:
        """Documents of every batch by domain, as many for one batch as for any other; where a batch would not be full
        that way, as many windows; None if it would not even then."""
        for by_documents in (True, False):
            found = self._dealt_by(batches, batch_size, seed, by_documents)
            if found is not None:
                return found
        return None

    def _dealt_by(
        self, batches: int, batch_size: int, seed: int, by_documents: bool
    ) -> list[dict[str, list[list[Window]]]] | None:
        """Domain by domain the document with the most windows goes to the batch that has the fewest documents of the
        domain (if they count), then the fewest windows of it, then of all; a document counts for no more windows than
        a batch takes."""
        rng = np.random.default_rng([seed, batches, batch_size])
        found: list[dict[str, list[list[Window]]]] = [{} for _ in range(batches)]
        total = [0] * batches
        for domain, documents in self.windows.items():
            order = sorted(rng.permutation(len(documents)), key=lambda index: -min(len(documents[index]), batch_size))
            heap = [(0, 0, total[place], float(rng.random()), place) for place in range(batches)]
            heapq.heapify(heap)
            for index in order:
                turn, own, _, tie, place = heap[0]
                size = min(len(documents[index]), batch_size)
                found[place].setdefault(domain, []).append(documents[index])
                total[place] += size
                heapq.heapreplace(heap, (turn + by_documents, own + size, total[place], tie, place))
        return found if batches and min(total) >= batch_size else None


def draw(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int,
    batches: int = 1,
    progress: Callable[[int], None] | None = None,
    fewer: str = FEWER,
) -> Sequences:
    """Draw `count` windows of `length + 1` tokens without overlap, in `batches` equal parts that share no document;
    arguments and errors as of `Cut`."""
    if count % batches:
        raise CarpoolError(f"{count} sequences do not make {batches} equal batches")
    cut = Cut.of(documents, tokenizer, length=length, seed=seed, progress=progress)
    return cut.draw(batches, count // batches, seed=seed, fewer=fewer)


def amount(tokens: int | None, batches: int | None, default: int, per_batch: int) -> tuple[int, int]:
    """The fewest batches that will do and how many are wanted.

    Args:
        tokens: decoded tokens that were asked for: at least as many batches, and as many as an interval needs if the
            texts hold them. batches: exactly so many instead.
        default: tokens that are wanted where neither was asked for; one batch will do.
        per_batch: decoded tokens of a batch.
    """
    if batches is not None:
        return batches, batches
    asked = max(1, round((tokens or default) / per_batch))
    return (1 if tokens is None else asked), max(asked, FEWEST)


def _filled(documents: dict[str, list[list[Window]]], count: int, rng: np.random.Generator) -> list[tuple[str, Window]]:
    """Windows of one batch and their domains."""
    queues = {domain: _in_turns(own, rng) for domain, own in documents.items()}
    taken: list[tuple[str, Window]] = []
    while len(taken) < count:
        for index in rng.permutation(len(queues)):
            domain = list(queues)[index]
            if queues[domain]:
                taken.append((domain, queues[domain].pop()))
    return taken[:count]


def _in_turns(documents: Sequence[list[Window]], rng: np.random.Generator) -> list[Window]:
    """Windows to take from the end: one of every document, then a second one of those that have it, and so on."""
    turns = [(turn, float(rng.random()), window) for own in documents for turn, window in enumerate(own)]
    return [window for _, _, window in sorted(turns, key=lambda one: one[:2], reverse=True)]


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _windows(ids: list[int], size: int, rng: np.random.Generator) -> list[Window]:
    if len(ids) < size:
        return []
    first = int(rng.integers(0, min(size, len(ids) - size + 1)))
    return [ids[start : start + size] for start in range(first, len(ids) - size + 1, size)]
