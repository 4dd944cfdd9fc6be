"""Weak first, strong for the rest: one batch of each, never question by question. Two modes are such a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.models.gate import Gate
from carpool.models.ledger import Ledger
from carpool.models.pool import Pool
from carpool.models.questions import Answer, Answers, Question, is_right
from carpool.models.schedule import CHUNK, Open, ask, turns


@dataclass(frozen=True, eq=False)
class Cascade:
    """What a cascade answered.

    Attributes:
        final: the answer that stands, one a question.
        passed_N: questions that the strong model was asked.
        written: tokens that both models wrote.
    """

    final: list[Answer]
    passed_N: Tensor
    written: int


def signals_of(answers: Sequence[Answer], names: Sequence[str]) -> Tensor:
    """Signals of answers by name, `[N, S]`; raises CarpoolError for one that they do not have.

    An answer to a question that did not fit has none; it counts as unsure.
    """
    if not names:
        raise CarpoolError("no signal is named; give one such as margin")
    known = sorted({name for one in answers for name in one.confidence})
    for name in names:
        if name not in known:
            raise CarpoolError(f"no signal {name!r} in these answers; there are {', '.join(known) or 'none'}")
    rows = [[one.confidence.get(name, 0.0) for name in names] for one in answers]
    return torch.tensor(rows, dtype=torch.float64)


def asked(
    pool: Pool, name: str, questions: Sequence[Question], open_runner: Open, answers: Answers, ledger: Ledger,
    chunk: int = CHUNK,
) -> list[Answer]:  # fmt: skip
    """Answers of one expert to all questions, asking for what `answers` lacks."""
    answers.require_current({name: pool[name].fingerprint})
    index = pool.index(name)
    missing = [(index, one) for one in questions if answers.of(one, name) is None]
    for _ in ask(turns(pool, missing), open_runner, answers, ledger, chunk=chunk):
        pass
    found = [answers.of(one, name) for one in questions]
    return [one for one in found if one is not None]


def calibrate(
    pool: Pool,
    weak: str,
    strong: str,
    questions: Sequence[Question],
    answers: Answers,
    *,
    signals: Sequence[str],
    max_loss: float = 0.01,
    max_tokens: float | None = None,
) -> Gate:
    """A gate from both experts' answers to questions with known answers (`Gate.calibrate`).

    Args:
        answers: of both experts to all questions.
        max_tokens: instead of `max_loss`, tokens that the strong model may write, as a mean over all questions.
    """
    sides = {name: [answers.of(one, name) for one in questions] for name in (weak, strong)}
    for name, made in sides.items():
        if any(one is None for one in made):
            raise CarpoolError(f"{name} has not answered all questions; let both experts answer all of them")
    right = {
        name: torch.tensor([is_right(one, said) for one, said in zip(questions, made, strict=True) if said])
        for name, made in sides.items()
    }
    table_NS = signals_of([one for one in sides[weak] if one], signals)
    cost_N = torch.tensor([one.written for one in sides[strong] if one], dtype=torch.float64)
    return Gate.calibrate(
        table_NS, right[weak], right[strong], max_loss=max_loss, max_cost=max_tokens,
        cost_N=None if max_tokens is None else cost_N,
    )  # fmt: skip


def cascade(
    pool: Pool,
    weak: str,
    strong: str,
    questions: Sequence[Question],
    gate: Gate | None,
    open_runner: Open,
    answers: Answers,
    ledger: Ledger,
    *,
    signals: Sequence[str] = (),
    always: str = "",
) -> Cascade:
    """Answer a batch: the weak expert everything, then the strong one, in one batch, what the gate passes on.

    Args:
        gate: with `signals`, the names that it was calibrated on; None with `always`.
        always: `weak` or `strong`: that expert alone, which is asked everything, the other nothing.
    """
    if always not in ("", "weak", "strong") or (gate is None) != bool(always):
        raise CarpoolError("a cascade takes a gate, or always='weak' or 'strong'")
    if always:
        name = weak if always == "weak" else strong
        final = asked(pool, name, questions, open_runner, answers, ledger)
        return Cascade(final, torch.full((len(final),), always == "strong"), sum(one.written for one in final))
    assert gate is not None
    first = asked(pool, weak, questions, open_runner, answers, ledger)
    passed_N = ~gate.keep(signals_of(first, signals))
    rest = [one for one, passed in zip(questions, passed_N.tolist(), strict=True) if passed]
    second = {one.id: one for one in asked(pool, strong, rest, open_runner, answers, ledger)}
    final = [second.get(one.id, one) for one in first]
    return Cascade(final, passed_N, sum(one.written for one in (*first, *second.values())))
