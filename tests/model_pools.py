"""Pools without models: experts that are right where they are told to be, and runners that count what they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from carpool.models.pool import Expert, Pool
from carpool.models.questions import Answer, Answers, Question


def pool_of(*names: str, **settings: Any) -> Pool:
    return Pool(tuple(Expert(name, "transformers", f"/no/such/{name}", weight_bytes=10, **settings) for name in names))


def asked() -> Answers:
    return Answers()


def answered(pool: Pool, questions: Sequence[Question], right: Mapping[str, Sequence[int]]) -> Answers:
    """Answers of every expert: `yes` where it is right."""
    made = Answers()
    for name, rights in right.items():
        made.add(
            Answer(one.id, one.hash, name, pool[name].fingerprint, "yes" if good else "no")
            for one, good in zip(questions, rights, strict=True)
        )
    return made


@dataclass
class Counting:
    """Opens runners that answer with the expert's name and the question, and remembers who was asked what."""

    fails_at: tuple[str, str] | None = None  # expert and question at which the model dies
    opened: list[tuple[str, ...]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    open_now: int = 0

    @contextmanager
    def __call__(self, expert: Expert) -> Iterator[Counting]:
        self.opened.append(expert.weights)
        self.open_now += 1
        assert self.open_now == 1, "two models at once"
        try:
            yield self
        finally:
            self.open_now -= 1

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        made = []
        for one in questions:
            if (expert.name, one.id) == self.fails_at:
                raise RuntimeError("out of memory\nat some place")
            self.asked.append((expert.name, one.id))
            text = f"{expert.name}: {expert.put(one.question)}"
            made.append(Answer(one.id, one.hash, expert.name, expert.fingerprint, text, read=3, written=2))
        return made
