"""Reading text files: plain text (one document a file) and JSON lines (one document a line, field `text`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError

MARK = "\ufeff"  # a byte order mark: files that were put together have some inside


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
        raise CarpoolError("no text was given: name one or more .txt or .jsonl files")
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
