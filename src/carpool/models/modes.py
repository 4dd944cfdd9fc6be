"""Modes: one model asked in two ways, fast and slow (Pangu Embedded's controller, arXiv 2505.22375).

The two modes are two experts of a pool with one model: a suffix of the prompt (`{question} /no_think`), an argument of
the chat template (`template = {enable_thinking = false}`) or a system message. A cascade (`models.cascade`) spends the
slow one by the confidence of the fast answer; `PromptSelector` decides before anything is written, from the prompt
alone. The paper's own selector is no rule but the model itself, which was trained to write its mode: with such a model
it is an expert like the others (`{question} /auto_think`).

Shapes: `N` questions, `F` features.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError

FEATURES = 64  # of hashed words, beside the prompt's length
STEPS, RATE, DECAY = 300, 0.05, 1e-2


@dataclass(frozen=True)
class PromptSelector:
    """How likely a prompt's fast answer is no worse: a logistic regression on its words and its length.

    Its `signal` goes to `Gate.calibrate` like any other. `length_only` is the control without which a selector that
    merely counts words looks clever.
    """

    weights: tuple[float, ...]
    length_only: bool = False

    @classmethod
    def fit(cls, prompts: Sequence[str], fast_is_fine_N: Tensor, *, length_only: bool = False) -> PromptSelector:
        """Raises CarpoolError unless both kinds of prompts are there."""
        if len(prompts) != len(fast_is_fine_N) or len(set(map(bool, fast_is_fine_N.tolist()))) < 2:
            raise CarpoolError("a prompt selector is fitted on prompts of both kinds, one truth value each")
        table_NF = _features(prompts, length_only)
        weight_F = torch.zeros(table_NF.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight_F], lr=RATE)
        for _ in range(STEPS):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(table_NF @ weight_F, fast_is_fine_N.double())
            optimizer.zero_grad()
            (loss + DECAY * weight_F[1:].square().sum()).backward()
            optimizer.step()
        return cls(tuple(weight_F.tolist()), length_only)

    def signal(self, prompts: Sequence[str]) -> Tensor:
        """`[N]` in [0, 1]."""
        return (_features(prompts, self.length_only) @ torch.tensor(self.weights, dtype=torch.float64)).sigmoid()


def _features(prompts: Sequence[str], length_only: bool) -> Tensor:
    """A constant, the logarithm of the length, and unless `length_only` which words there are, hashed, `[N, F]`."""
    rows = []
    for prompt in prompts:
        row = [0.0] * (0 if length_only else FEATURES)
        for word in set() if length_only else set(re.findall(r"\w+|[^\w\s]", prompt.lower())):
            row[int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % FEATURES] = 1.0
        rows.append([1.0, math.log1p(len(prompt)) / 8, *row])
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Loop:
    """A text's end that repeats itself.

    Attributes:
        period: tokens of what is repeated. times: how often it stands at the end.
    """

    period: int
    times: int


def loop_at_end(ids: Sequence[int], *, times: int = 3, least: int = 4, longest: int = 64) -> Loop | None:
    """The loop in which a text ends: the last `period` tokens stand there `times` times in a row, and take `least`
    tokens or more in all; the shortest such period. None where there is none.

    Args:
        longest: the longest period that is looked for.
    """
    for period in range(1, min(longest, len(ids) // times) + 1):
        tail = ids[-period:]
        if period * times < least:
            continue
        if all(list(ids[-period * (turn + 1) : len(ids) - period * turn]) == list(tail) for turn in range(times)):
            return Loop(period, times)
    return None


class RepetitionRepair:
    """Breaks loops while a text is written: once a row's new tokens end in one, a control text is forced in.

    A processor of logits for `generate` in transformers (Pangu Embedded's repetition self-repair). A row is repaired
    at most `repairs` times. Rows keep their places: no beams.
    """

    def __init__(
        self, control: Sequence[int], prompt: int, *, times: int = 3, least: int = 12, repairs: int = 2
    ) -> None:
        """Args: control: tokens to force. prompt: tokens of the (padded) prompt, which may repeat itself at will."""
        if not control:
            raise CarpoolError("a control text without tokens; give one such as ' Wait.'")
        self.control, self.prompt, self.times, self.least, self.repairs = list(control), prompt, times, least, repairs
        self.forcing: dict[int, int] = {}  # row: tokens of the control text that it has
        self.begun: dict[int, list[int]] = {}  # row: lengths at which it was repaired

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `[B, V]` for the next token of texts `[B, L]`."""
        for row, ids in enumerate(input_ids[:, self.prompt :].tolist()):
            done = self.forcing.get(row)
            begun = self.begun.setdefault(row, [])
            if done is None and len(begun) < self.repairs:
                since = begun[-1] if begun else 0
                if loop_at_end(ids[since:], times=self.times, least=self.least) is not None:
                    done = 0
                    begun.append(len(ids) + len(self.control))
            if done is None:
                continue
            forced = torch.full_like(scores[row], -torch.inf)
            forced[self.control[done]] = 0.0
            scores[row] = forced
            self.forcing[row] = done + 1
            if done + 1 == len(self.control):
                del self.forcing[row]
        return scores
