"""Questions and answers as JSON lines; answers are kept as they come, so that no run asks anybody twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from carpool.artefacts.files import require_file, require_folder_around
from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError

CUT_SHORT = "length"  # the finish of an answer that ran into its limit
TOO_LONG = "too_long"  # and of a question that does not fit an expert's context
UNFINISHED = (CUT_SHORT, TOO_LONG)


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        id: unique.
        question: the text.
        choices: continuations to choose from; empty: the answer is written.
        answer: the right one: the place of a choice (from 0), or the text; None where it is not known.
        skills: what it takes, in words.
    """

    id: str
    question: str
    choices: tuple[str, ...] = ()
    answer: int | str | None = None
    skills: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """Of what is asked; an answer to another text under the same id is no answer."""
        return hashlib.sha256(json.dumps([self.question, self.choices]).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Answer:
    """What an expert said.

    Attributes:
        id: of the question. asked: its hash. expert: its name. fingerprint: of the expert as it was then.
        text: what was written, or the choice. choice: its place; None where the answer was written.
        finish: why it ended: `stop`, `length`, `choice`, or `too_long` where the question does not fit.
        read, written: tokens.
        confidence: signals by name, each in [0, 1] (`models.confidence`).
    """

    id: str
    asked: str
    expert: str
    fingerprint: str
    text: str
    choice: int | None = None
    finish: str = "stop"
    read: int = 0
    written: int = 0
    confidence: Mapping[str, float] = field(default_factory=dict)


def is_right(question: Question, answer: Answer) -> bool:
    """Whether it is the known answer; raises CarpoolError where none is known."""
    if question.answer is None:
        raise CarpoolError(f'question {question.id!r} has no known answer; add "answer" to compare with it')
    if question.choices:
        return answer.choice == question.answer
    return normalised(answer.text) == normalised(str(question.answer))


def normalised(text: str) -> str:
    """A written answer as it is compared: spaces at its ends and inside are no difference."""
    return " ".join(text.split())


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a JSON lines file; raises CarpoolError, which names the line, for what is none."""
    found = []
    for number, line in _lines(path, "the questions"):
        where = f"{path}, line {number}"
        one = parse_json(line, where)
        if not isinstance(one, dict) or not isinstance(one.get("question"), str):
            raise CarpoolError(f'{where}: a question is an object with "id" and "question"')
        choices, skills, answer = one.get("choices", []), one.get("skills", []), one.get("answer")
        for name, texts in (("choices", choices), ("skills", skills)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise CarpoolError(f"{where}: {name} is a list of texts")
        if len(choices) == 1 or (choices and answer is not None and answer not in range(len(choices))):
            raise CarpoolError(f"{where}: give two choices or more; the answer is the place of one, from 0")
        if not choices and isinstance(answer, bool | list | dict | float):
            raise CarpoolError(f"{where}: the answer is a text")
        found.append(Question(str(one.get("id", number)), one["question"], tuple(choices), answer, tuple(skills)))
    ids = {one.id for one in found}
    if not found:
        raise CarpoolError(f"{path} holds no questions; give one JSON object a line")
    if len(ids) < len(found):
        raise CarpoolError(f'{path}: {len(found) - len(ids)} questions have the "id" of another one; ids are unique')
    return found


class Answers:
    """The answers of a run, in memory and, with a path, on disk as they come. One writer at a time."""

    def __init__(self, path: str | Path | None = None) -> None:
        """Reads what an earlier run left; a last line that was cut short is cut off.

        Raises:
            CarpoolError: the file holds something else, or cannot be written.
        """
        self.path = None if path is None else Path(path)
        self.by_key: dict[tuple[str, str], Answer] = {}
        if self.path is None:
            return
        require_folder_around(self.path)
        if self.path.exists():
            self._read(require_file(self.path, "the answers"))

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                one = Answer(**parse_json(line, f"{path}, line {number}"))
            except TypeError:
                raise CarpoolError(f"{path}, line {number} is no answer of a run; write to another file") from None
            self.by_key[one.id, one.expert] = one
        if whole < len(content):
            os.truncate(path, whole)

    def of(self, question: Question, expert: str) -> Answer | None:
        """What the expert said, if it was asked this."""
        found = self.by_key.get((question.id, expert))
        return found if found is not None and found.asked == question.hash else None

    def require_current(self, fingerprints: Mapping[str, str]) -> None:
        """Raises CarpoolError if an expert has changed since it answered."""
        for one in self.by_key.values():
            if fingerprints.get(one.expert, one.fingerprint) != one.fingerprint:
                raise CarpoolError(
                    f"{self.path}: {one.expert} has other weights or settings than when it answered; "
                    "write to another file"
                )

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep them; on disk when this returns."""
        answers = list(answers)
        self.by_key |= {(one.id, one.expert): one for one in answers}
        if self.path is not None and answers:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answers)
                file.flush()
                os.fsync(file.fileno())


def _lines(path: str | Path, what: str) -> Iterable[tuple[int, str]]:
    try:
        text = require_file(path, what).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CarpoolError(f"cannot read {what} {path}: {error}") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
