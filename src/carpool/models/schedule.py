"""Answers a batch model by model: all questions of one model together, each model loaded once, what is there first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from carpool.errors import CarpoolError
from carpool.models.ledger import Ledger
from carpool.models.pool import Expert, Pool
from carpool.models.questions import Answer, Answers, Question
from carpool.models.recruit import Assignment

CHUNK = 32  # questions whose answers are kept together; a run that is killed asks these again


class Runner(Protocol):
    """A loaded model, which answers as any expert that has its weights."""

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in their order, at temperature 0."""


Open = Callable[[Expert], AbstractContextManager[Runner]]  # loads a model, and lets go of it at the block's end


@dataclass(frozen=True)
class Turn:
    """A model and what it is asked: pairs of an expert with its weights, and a question."""

    expert: Expert
    pairs: tuple[tuple[Expert, Question], ...]


def turns(pool: Pool, pairs: Iterable[tuple[int, Question]], last: str | None = None) -> list[Turn]:
    """Group pairs of expert and question by the weights they need: servers first (they are resident), then by how many
    questions wait for a model, most first, so that most answers are there if a run ends early.

    Args:
        last: an expert whose turn comes last, such as an aggregator.
    """
    found: dict[tuple[str, ...], list[tuple[Expert, Question]]] = {}
    for index, question in pairs:
        expert = pool.experts[index]
        found.setdefault(expert.weights, []).append((expert, question))
    made = []
    for asked in found.values():
        order = {expert.name: place for place, expert in enumerate(pool.experts)}
        asked.sort(key=lambda pair: order[pair[0].name])  # stable: questions stay in their order
        made.append(Turn(asked[0][0], tuple(asked)))
    final = None if last is None else pool[last].weights
    return sorted(
        made, key=lambda turn: (turn.expert.weights == final, turn.expert.engine != "server", -len(turn.pairs))
    )


def answer(
    pool: Pool,
    questions: Sequence[Question],
    assignment: Assignment,
    open_runner: Open,
    answers: Answers,
    ledger: Ledger,
    *,
    chunk: int = CHUNK,
) -> Iterator[Answer]:
    """Ask every question's recruits, model by model; what `answers` holds already is not asked again.

    Yields:
        Each new answer, which `answers` has kept by then.

    Raises:
        CarpoolError: an expert that changed since it answered; a model that does not load, or ends in mid-run. Answers
            that are there stay.
    """
    pairs = unasked(pool, questions, [assignment.asked(row) for row in range(len(questions))], answers)
    yield from ask(turns(pool, pairs), open_runner, answers, ledger, chunk=chunk)


def unasked(
    pool: Pool, questions: Sequence[Question], rows: Sequence[Sequence[int]], answers: Answers
) -> list[tuple[int, Question]]:
    """Pairs of expert and question of which no answer is kept.

    Args:
        rows: experts of each question.

    Raises:
        CarpoolError: an expert has changed since it answered.
    """
    answers.require_current({expert.name: expert.fingerprint for expert in pool.experts})
    return [
        (index, question)
        for question, row in zip(questions, rows, strict=True)
        for index in row
        if answers.of(question, pool.experts[index].name) is None
    ]


def ask(
    planned: Iterable[Turn], open_runner: Open, answers: Answers, ledger: Ledger, *, chunk: int = CHUNK
) -> Iterator[Answer]:
    """Take the turns; see `answer`."""
    for turn in planned:
        account, begun = ledger.of(turn.expert), time.perf_counter()
        try:
            with open_runner(turn.expert) as runner:
                if turn.expert.engine != "server":
                    account.loads += 1
                    account.bytes += turn.expert.bytes
                account.load_seconds += time.perf_counter() - begun
                for expert, part in _chunks(turn, chunk):
                    begun = time.perf_counter()
                    made = runner.answer(expert, part)
                    if [one.id for one in made] != [question.id for question in part]:
                        raise CarpoolError(f"{expert.name} answered other questions than it was asked")
                    account.answer_seconds += time.perf_counter() - begun
                    account.questions += len(part)
                    account.read += sum(one.read for one in made)
                    account.written += sum(one.written for one in made)
                    answers.add(made)
                    yield from made
        except CarpoolError:
            raise
        except (OSError, RuntimeError, MemoryError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CarpoolError(
                f"{turn.expert.name} failed ({said[:300]}); {len(answers.by_key)} finished answers are kept, "
                "run again to go on"
            ) from error


def _chunks(turn: Turn, size: int) -> Iterator[tuple[Expert, list[Question]]]:
    """Parts of a turn with one expert each."""
    part: list[Question] = []
    for place, (expert, question) in enumerate(turn.pairs):
        part.append(question)
        following = turn.pairs[place + 1][0] if place + 1 < len(turn.pairs) else None
        if len(part) == size or following is not expert:
            yield expert, part
            part = []
