"""An aggregator: one expert that reads what the recruits said, once, and answers (Symbolic-MoE, arXiv 2503.05641)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from carpool.errors import CarpoolError
from carpool.models.ledger import Ledger
from carpool.models.pool import Pool
from carpool.models.questions import UNFINISHED, Answer, Answers, Question, is_right
from carpool.models.recruit import Assignment
from carpool.models.schedule import Open, ask, turns

MARK = "#combined"  # ends the id of a question that carries answers
WRONG = 2  # wrong answers beside the right one on an item that aggregators are chosen by


def combined(question: Question, said: Sequence[Answer]) -> Question:
    """The question with answers to it, as an aggregator reads it; those that were cut short are left out."""
    told = [one.text for one in said if one.finish not in UNFINISHED]
    parts = [question.question, *(f"Answer {place}: {text}" for place, text in enumerate(told, 1)), "Final answer:"]
    return replace(question, id=question.id + MARK, question="\n\n".join(parts))


def trials(pool: Pool, questions: Sequence[Question], answers: Answers, seed: int = 0) -> list[Question]:
    """Items to choose an aggregator by: one right answer and two wrong ones, in an order of chance.

    Items on which the experts have not given these are left out. (The paper's repository fills the gaps with empty
    texts, by which easy items become trivial and hopeless ones impossible.)
    """
    rng, made = random.Random(seed), []
    for question in questions:
        found = [one for name in pool.names if (one := answers.of(question, name)) is not None]
        whole = [one for one in found if one.finish not in UNFINISHED]
        right = [one for one in whole if is_right(question, one)]
        wrong = [one for one in whole if not is_right(question, one)]
        if right and len(wrong) >= WRONG:
            said = [rng.choice(right), *rng.sample(wrong, WRONG)]
            rng.shuffle(said)
            made.append(combined(question, said))
    return made


def choose(
    pool: Pool, questions: Sequence[Question], answers: Answers, open_runner: Open, ledger: Ledger, seed: int = 0
) -> dict[str, float]:
    """Share of right answers of each expert as the aggregator, best first; the first of equals in the pool's order.

    Args:
        answers: of all experts to the questions; the trials' answers join them.

    Raises:
        CarpoolError: no item has one right and two wrong answers.
    """
    made = trials(pool, questions, answers, seed)
    if not made:
        raise CarpoolError("no question has a right and two wrong answers, by which an aggregator is chosen; give more")
    pairs = [(index, one) for one in made for index in range(len(pool)) if answers.of(one, pool.names[index]) is None]
    for _ in ask(turns(pool, pairs), open_runner, answers, ledger):
        pass
    right = dict.fromkeys(pool.names, 0)
    for one in made:
        for name in pool.names:
            said = answers.of(one, name)
            right[name] += said is not None and is_right(one, said)
    return {name: right[name] / len(made) for name in sorted(pool.names, key=lambda name: -right[name])}


def aggregate(
    pool: Pool,
    aggregator: str,
    questions: Sequence[Question],
    assignment: Assignment,
    answers: Answers,
    open_runner: Open,
    ledger: Ledger,
) -> list[Answer]:
    """The aggregator's answer to each question, from those of its recruits; a recruit drawn twice speaks once."""
    index, asked = pool.index(aggregator), []
    for row, question in enumerate(questions):
        said = [answers.of(question, pool.names[expert]) for expert in assignment.asked(row)]
        asked.append(combined(question, [one for one in said if one is not None]))
    missing = [(index, one) for one in asked if answers.of(one, aggregator) is None]
    for _ in ask(turns(pool, missing), open_runner, answers, ledger):
        pass
    found = [answers.of(one, aggregator) for one in asked]
    return [replace(one, id=one.id.removesuffix(MARK)) for one in found if one is not None]
