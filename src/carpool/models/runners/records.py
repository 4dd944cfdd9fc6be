"""From what an engine returns to an answer: the same rules for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from carpool.errors import CarpoolError
from carpool.models.confidence import SIGNALS, answer_least, answer_mean
from carpool.models.pool import Expert
from carpool.models.questions import CUT_SHORT, TOO_LONG, Answer, Question


@dataclass(frozen=True)
class Written:
    """What an engine wrote.

    Attributes:
        text: without the stop text. finish: `stop` or `length`. read: tokens of the prompt.
        tokens: the text of each token. logprobs: of each. margins: probability of each less that of the second best.
    """

    text: str
    finish: str
    read: int
    tokens: Sequence[str]
    logprobs: Sequence[float]
    margins: Sequence[float]


def written(expert: Expert, question: Question, made: Written) -> Answer:
    """The answer with its confidence over the answer proper (`Expert.answer_after`)."""
    text, first = made.text, 0
    if expert.answer_after:
        before, mark, text = made.text.rpartition(expert.answer_after)
        length = 0
        while mark and first < len(made.tokens) and length < len(before) + len(mark):
            length += len(made.tokens[first])
            first += 1
        if not mark:  # it never came to its answer
            first, text = len(made.tokens), made.text
    if made.finish == CUT_SHORT:
        text = text.rstrip("\ufffd")  # half a character, of which some engines show nothing
    logprobs_1T = torch.tensor([list(made.logprobs)], dtype=torch.float64)
    span_1T = (torch.arange(logprobs_1T.shape[1]) >= first).unsqueeze(0)
    confidence = dict.fromkeys(("mean", "least", "margin"), 0.0)
    if bool(span_1T.any()):
        confidence = {
            "mean": float(answer_mean(logprobs_1T, span_1T)),
            "least": float(answer_least(logprobs_1T, span_1T)),
            "margin": max(0.0, sum(made.margins[first:]) / (len(made.margins) - first)),
        }
    return Answer(
        question.id, question.hash, expert.name, expert.fingerprint, text.strip(), None, made.finish, made.read,
        len(made.tokens), confidence,
    )  # fmt: skip


def chosen(expert: Expert, question: Question, logprobs: Sequence[Sequence[float]], read: int) -> Answer:
    """The choice whose tokens are the most probable on average, with its confidence among all choices.

    Args:
        logprobs: of each choice's tokens. read: tokens that were read for all of them.

    Raises:
        CarpoolError: a choice without a token of its own.
    """
    if not all(logprobs):
        place = next(place for place, one in enumerate(logprobs) if not one)
        raise CarpoolError(
            f"question {question.id!r}: choice {place} has no token of its own for {expert.name}; begin it with a space"
        )
    mean_C = torch.tensor([sum(one) / len(one) for one in logprobs], dtype=torch.float64)
    p_1C = mean_C.softmax(-1).unsqueeze(0)
    best = int(mean_C.argmax())
    confidence = {name: float(signal(p_1C)) for name, signal in SIGNALS.items()}
    return Answer(
        question.id, question.hash, expert.name, expert.fingerprint, question.choices[best], best, "choice", read, 0,
        confidence,
    )  # fmt: skip


def too_long(expert: Expert, question: Question) -> Answer:
    """The empty answer to a question that does not fit."""
    return Answer(question.id, question.hash, expert.name, expert.fingerprint, "", None, TOO_LONG)
