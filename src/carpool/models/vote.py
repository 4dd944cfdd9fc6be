"""One answer from those of several experts: a weighted vote."""

from __future__ import annotations

from collections.abc import Sequence

from carpool.models.pool import Pool
from carpool.models.questions import UNFINISHED, Answer, Answers, Question, normalised
from carpool.models.recruit import Assignment


def vote(answers: Sequence[Answer], weights: Sequence[float]) -> Answer | None:
    """The answer of most weight, the first of several; written answers are one where they differ in spaces only.

    Answers that were cut short have no say (their end, where the answer stands, is missing), unless all were.
    """
    whole = [pair for pair in zip(answers, weights, strict=True) if pair[0].finish not in UNFINISHED]
    counted: dict[object, float] = {}
    first: dict[object, Answer] = {}
    for one, weight in whole or list(zip(answers, weights, strict=True)):
        key = normalised(one.text) if one.choice is None else one.choice
        counted[key] = counted.get(key, 0.0) + weight
        first.setdefault(key, one)
    return first[max(counted, key=lambda key: counted[key])] if counted else None


def votes(pool: Pool, questions: Sequence[Question], assignment: Assignment, answers: Answers) -> list[Answer | None]:
    """The vote on every question; None where none of its recruits has answered. A recruit counts as often as drawn."""
    made = []
    for row, question in enumerate(questions):
        ids, weights = assignment.ids_NK[row].tolist(), assignment.weights_NK[row].tolist()
        pairs = [
            (answers.of(question, pool.experts[index].name), weight) for index, weight in zip(ids, weights, strict=True)
        ]
        said = [(one, weight) for one, weight in pairs if one is not None]
        made.append(vote([one for one, _ in said], [weight for _, weight in said]))
    return made
