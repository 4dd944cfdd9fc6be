"""Text to search on, and text to verify on that the search never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from carpool.artefacts.texts import Document, divide


@dataclass(frozen=True)
class Halves:
    """Documents of both halves, in the order they were given.

    Attributes:
        dropped: documents that said what another one says.
    """

    search: list[Document]
    verify: list[Document]
    dropped: int


def split(documents: Sequence[Document]) -> Halves:
    """Two halves of about equal length, domain by domain, without a text in common (`carpool.artefacts.texts.divide`).

    Raises:
        CarpoolError: the one document of a domain says in its second half what it said in the first.
    """
    parts = divide(documents, 0.5)
    return Halves(parts.first, parts.second, parts.dropped)
