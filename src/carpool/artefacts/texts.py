"""Reading text files: plain text (one document a file) and JSON lines (one document a line, field `text`)."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError

MARK = "\ufeff"  # a byte order mark: files that were put together have some inside
PIECE, PIECES = 64, 100  # characters of a piece, and pieces, by which two parts of a document are compared


@dataclass(frozen=True)
class Document:
    """One text and the domain it belongs to (the stem of its file's name)."""

    domain: str
    text: str


def load_texts(paths: Sequence[str | Path]) -> list[Document]:
    """All documents of `.txt` and `.jsonl` files, in the order given; documents of white space alone are left out.

    The domain is the file's stem; files that share a stem are told apart by their folder (`german/train`).

    Raises:
        CarpoolError: no file, a missing or unreadable one, another suffix, not UTF-8, a line that is no JSON object
            with a string `text`, or a file without any text.
    """
    if not paths:
        raise CarpoolError("no text was given: name one or more .txt or .jsonl files (--text FILE on the command line)")
    files = [Path(path) for path in paths]
    stems = Counter(file.stem for file in dict.fromkeys(files))
    documents: list[Document] = []
    for file in files:
        domain = file.stem if stems[file.stem] == 1 else f"{file.resolve().parent.name}/{file.stem}"
        found = [Document(domain, text) for text in _texts(file) if text.strip()]
        if not found:
            raise CarpoolError(f"{file} holds no text")
        documents.extend(found)
    return documents


@dataclass(frozen=True)
class Parts:
    """Documents of two parts without a text in common, in the order they were given.

    Attributes:
        dropped: documents that said what another one says.
    """

    first: list[Document]
    second: list[Document]
    dropped: int


def divide(documents: Sequence[Document], share: float) -> Parts:
    """Two parts without a text in common, domain by domain; the first holds about this share of the characters.

    Texts that differ in white space or case alone are one. A domain's documents are put in the order of a hash of their
    text and divided where the share of the length is reached: the order they are given in, a seed and other documents
    do not move a text to the other part, unless it lies next to the cut. Where a domain has too few documents for that,
    each of them is cut.

    Args:
        share: above 0, below 1.

    Raises:
        CarpoolError: a document that is cut says in its second part what it said in the first.
    """
    keys: dict[str, Document] = {}
    for document in documents:
        keys.setdefault(_key(document.text), document)
    firsts, seconds = set[str](), set[str]()
    halved: dict[str, tuple[Document, Document]] = {}
    for domain in dict.fromkeys(one.domain for one in keys.values()):
        own = sorted(key for key, one in keys.items() if one.domain == domain)
        if len(own) * min(share, 1 - share) < 1 - 1e-9:
            halved |= {key: _cut(keys[key], share) for key in own}
            continue
        ends = list(accumulate(len(keys[key].text) for key in own))
        count = min(range(1, len(own)), key=lambda count: abs(ends[count - 1] - share * ends[-1]))
        firsts |= set(own[:count])
        seconds |= set(own[count:])
    seen: set[str] = set()  # part of a document may be another document
    first = _unlike(seen, [halved[key][0] if key in halved else one for key, one in keys.items() if key not in seconds])
    second = _unlike(seen, [halved[key][1] if key in halved else one for key, one in keys.items() if key not in firsts])
    return Parts(first, second, len(documents) + len(halved) - len(first) - len(second))


def _unlike(seen: set[str], documents: Sequence[Document]) -> list[Document]:
    """The documents that say what none that was seen says."""
    found = {key: one for one in documents if (key := _key(one.text)) not in seen}
    seen |= set(found)
    return list(found.values())


def _key(text: str) -> str:
    """Hash of what a text says."""
    said = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return hashlib.sha256(said.encode()).hexdigest()


def _cut(document: Document, share: float) -> tuple[Document, Document]:
    place = int(share * len(document.text))
    parts = document.text[:place], document.text[place:]
    first, second = (" ".join(part.split()) for part in parts)
    starts = range(0, max(len(second) - PIECE, 0) + 1, max(len(second) // PIECES, 1))
    repeated = sum(second[start : start + PIECE] in first for start in starts)
    if 2 * repeated > len(starts):
        raise CarpoolError(
            f"the end of a document of {document.domain!r} repeats its beginning, so that nothing of it is left that "
            "was not seen before: give it once, or add documents"
        )
    return Document(document.domain, parts[0]), Document(document.domain, parts[1])


def _texts(file: Path) -> Iterator[str]:
    kind = file.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise CarpoolError(f"{file} is neither a .txt nor a .jsonl file; convert it to one of them")
    content = _read(file)
    if kind == ".txt":
        yield re.sub(rf"^{MARK}", "", content, flags=re.MULTILINE)
        return
    # not splitlines(): JSON strings may hold U+2028 and its like, which are no ends of lines
    for number, line in enumerate(re.split("\r\n|\r|\n", content), start=1):
        if entry := line.lstrip(MARK).strip():
            yield _text_of(entry, f"{file}, line {number}")


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CarpoolError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise CarpoolError(f"cannot read {file}: {error.strerror}") from None


def _text_of(line: str, where: str) -> str:
    entry = parse_json(line, where, any_number=True)
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        fields = f"its fields are {', '.join(map(repr, entry))}" if isinstance(entry, dict) else "it is no object"
        raise CarpoolError(f'{where} has no "text" field that holds a string ({fields})')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CarpoolError(f"{where}: the text holds half a surrogate pair, which is not valid Unicode") from None
    return text
