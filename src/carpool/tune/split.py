"""Text to search on, and text to verify on that the search never sees."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from carpool.artefacts.texts import Document
from carpool.errors import CarpoolError

PIECE, PIECES = 64, 100  # characters of a piece, and pieces, by which two halves of a document are compared


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
    """Two halves of about equal length, domain by domain, without a text in common.

    Texts that differ in white space or case alone are one. A domain's documents are put in the order of a hash of their
    text and cut where half of the length is reached: the order they are given in, a seed and other documents do not
    move a text to the other half, unless it lies next to the cut. A domain of one document is cut in the middle.

    Raises:
        CarpoolError: the one document of a domain says in its second half what it said in the first.
    """
    keys: dict[str, Document] = {}
    for document in documents:
        keys.setdefault(_key(document.text), document)
    searched, verified = set[str](), set[str]()
    cut: dict[str, tuple[Document, Document]] = {}
    for domain in dict.fromkeys(one.domain for one in keys.values()):
        own = sorted(key for key, one in keys.items() if one.domain == domain)
        if len(own) == 1:
            cut[own[0]] = _cut(keys[own[0]])
            continue
        ends = list(accumulate(len(keys[key].text) for key in own))
        first = min(range(1, len(own)), key=lambda count: abs(2 * ends[count - 1] - ends[-1]))
        searched |= set(own[:first])
        verified |= set(own[first:])
    seen: set[str] = set()  # half of a document may be another document
    search = _unlike(seen, [cut[key][0] if key in cut else one for key, one in keys.items() if key not in verified])
    verify = _unlike(seen, [cut[key][1] if key in cut else one for key, one in keys.items() if key not in searched])
    dropped = len(documents) + len(cut) - len(search) - len(verify)
    return Halves(search, verify, dropped)


def _unlike(seen: set[str], documents: Sequence[Document]) -> list[Document]:
    """The documents that say what none that was seen says."""
    found = {key: one for one in documents if (key := _key(one.text)) not in seen}
    seen |= set(found)
    return list(found.values())


def _key(text: str) -> str:
    """Hash of what a text says."""
    said = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return hashlib.sha256(said.encode()).hexdigest()


def _cut(document: Document) -> tuple[Document, Document]:
    middle = len(document.text) // 2
    first, second = (" ".join(part.split()) for part in (document.text[:middle], document.text[middle:]))
    starts = range(0, max(len(second) - PIECE, 0) + 1, max(len(second) // PIECES, 1))
    repeated = sum(second[start : start + PIECE] in first for start in starts)
    if 2 * repeated > len(starts):
        raise CarpoolError(
            f"the second half of the only document of {document.domain!r} repeats the first, so that nothing of it is "
            "left to verify on: give it once, or add documents"
        )
    return Document(document.domain, document.text[:middle]), Document(document.domain, document.text[middle:])
