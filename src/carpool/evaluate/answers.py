"""Log-likelihoods of given answers in lockstep: what decoding them together computes.

To an engine an answer that is scored is a prompt, and prompts keep their native routing: scoring it in one pass would
measure the stock model. Here the rows that predict an answer's tokens decode, the j-th ones of a batch in one step. The
first of them is the last row of the context. (A server computes that row with the prompt, natively, so that what is
measured here is never milder.)

Shapes: `B` sequences of a batch, `T` positions of the longest, `R` rows that decode, `P` answer tokens of all
questions, `V` vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from carpool.calibrate.divergence import CHUNK
from carpool.errors import CarpoolError
from carpool.evaluate.lockstep import Observer, forward
from carpool.plans.policy_file import AnyPlan
from carpool.routing.batch import Batch, Grouping


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of the answer whose likelihood is asked for, one or more each."""

    context: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.answer:
            raise CarpoolError("a context and an answer have at least one token each")

    @property
    def stem(self) -> Stem:
        """What is decoded: answers to one question that differ in their last token alone are one sequence."""
        return self.context, self.answer[:-1]


Stem = tuple[tuple[int, ...], tuple[int, ...]]  # a context, and the answer but for its last token


class Answers:
    """The rows of a batch of sequences, padded on the right; used as `carpool.evaluate.layout.Layout` is.

    Attributes:
        batch_size: sequences, `B`. positions: inputs of the longest, `T`.
        steps: tokens (or blocks) of the longest answer.
        grouping: which rows share a coreset.
        ids_BT: inputs.
        lengths: rows of each sequence that decode: those that predict a token of the answer.
    """

    def __init__(self, sequences: Sequence[Stem], grouping: Grouping) -> None:
        if grouping.kind in ("tenant", "prompt"):
            raise CarpoolError(
                f"group={str(grouping)!r}: requests of a task have no tenants and are nobody's samples; group by "
                "batch, request or block:n"
            )
        inputs = [(*context, *answer) for context, answer in sequences]
        self.batch_size, self.positions, self.grouping = len(sequences), max(map(len, inputs)), grouping
        self.ids_BT = torch.tensor([[*given, *[0] * (self.positions - len(given))] for given in inputs])
        self.lengths = [len(answer) + 1 for _, answer in sequences]
        first_B1 = torch.tensor([[len(context) - 1] for context, _ in sequences])
        offset_BT = torch.arange(self.positions) - first_B1  # of the answer
        self._exempt_BT = offset_BT < 0
        self._real_BT = offset_BT < torch.tensor(self.lengths).unsqueeze(1)
        self._decoded_BT = self._real_BT & ~self._exempt_BT
        stride = grouping.block or 1
        self.steps = -(-max(self.lengths) // stride)
        self._step_BT = torch.where(self._decoded_BT, offset_BT // stride, self.steps)

    def batch(self, copies: int, device: torch.device | str = "cpu") -> Batch:
        """The rows of the pass; contexts and padding are in a step of their own."""
        assert copies == 1, "batches of questions differ in shape"
        step_N, num_steps = self._step_BT.flatten().to(device), self.steps + 1
        group_N, groups = step_N, 1
        if self.grouping.kind not in ("batch", "position"):
            row_N = torch.arange(self.batch_size, device=device).repeat_interleave(self.positions)
            group_N, groups = step_N * self.batch_size + row_N, self.batch_size
        return Batch.of(
            step_N.numel(), device=device, real_N=self._real_BT.flatten().to(device),
            exempt_N=self._exempt_BT.flatten().to(device),
            group_N=group_N, num_groups=num_steps * groups, step_N=step_N, num_steps=num_steps,
        )  # fmt: skip

    def by_step(self, values_S: Tensor, copies: int) -> Tensor:
        """Values of steps (or of groups), summed over the decoding steps, `[1]`."""
        return values_S.view(copies, self.steps + 1, -1)[:, : self.steps].sum((1, 2))

    def by_token(self, values_N: Tensor, copies: int) -> Tensor:
        """Values of rows, summed over those that decode, `[1]`."""
        return values_N[self._decoded_BT.flatten().to(values_N.device)].sum().view(copies)

    def logits(self, model: Any, ids_BT: Tensor) -> Tensor:
        """Logits `[R, V]` of the rows that decode; the head runs on no position that none of them asks for."""
        kept_U = self._decoded_BT.any(0).nonzero().flatten().to(ids_BT.device)
        logits_BUV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept_U).logits
        return logits_BUV[self._decoded_BT.to(ids_BT.device)[:, kept_U]]


def score(
    model: Any,
    plan: AnyPlan,
    questions: Sequence[Question],
    grouping: Grouping,
    *,
    num_layers: int,
    stats: Any = None,
    observe: Observer | None = None,
) -> list[tuple[float, bool]]:
    """Log-likelihood of every answer in nats, and whether greedy decoding would give it; all are one batch.

    Args:
        num_layers, stats, observe: as of `carpool.evaluate.lockstep.forward`.

    Raises:
        CarpoolError: what `forward` raises; logits that are not finite.
    """
    places: dict[Stem, int] = {}
    for one in questions:
        places.setdefault(one.stem, len(places))
    layout = Answers(list(places), grouping)
    logits_RV = forward(
        model, plan, layout.ids_BT, layout, num_layers=num_layers, stats=stats, observe=observe
    ).logits_RV
    size, wide = max(1, CHUNK // logits_RV.shape[-1]), torch.promote_types(logits_RV.dtype, torch.float32)
    scale_R = torch.cat([part_CV.to(wide).logsumexp(-1) for part_CV in logits_RV.split(size)])
    best_R = logits_RV.argmax(-1)
    first_B = [0, *accumulate(layout.lengths)]
    row_P = torch.tensor([first_B[places[one.stem]] + place for one in questions for place in range(len(one.answer))])
    token_P = torch.tensor([token for one in questions for token in one.answer])
    row_P, token_P = row_P.to(logits_RV.device), token_P.to(logits_RV.device)
    log_P = (logits_RV[row_P, token_P].to(wide) - scale_R[row_P]).double().cpu()
    if not log_P.isfinite().all():
        raise CarpoolError("the model gives logits that are not finite; evaluate it in float32 or bfloat16")
    lengths = [len(one.answer) for one in questions]
    parts = zip(log_P.split(lengths), (best_R[row_P] == token_P).cpu().split(lengths), strict=True)
    return [(float(part.sum()), bool(same.all())) for part, same in parts]


def deal(questions: Sequence[Question], size: int, seed: int = 0) -> list[list[int]]:
    """Batches of `size` sequences, as the places of their questions; together they hold every question.

    Answers of like length go together, so that batches stay full to their last steps; sequences of one context go
    apart, since the requests of a real batch have little in common. The last batch is filled up with sequences that
    another batch holds, too.
    """
    asked: dict[Stem, list[int]] = {}
    for place, one in enumerate(questions):
        asked.setdefault(one.stem, []).append(place)
    turns: dict[tuple[int, ...], int] = {}
    drawn = random.Random(seed)
    key: dict[Stem, tuple[int, int, float]] = {}
    for context, answer in asked:
        turns[context] = turns.get(context, 0) + 1
        key[context, answer] = (-len(answer), turns[context], drawn.random())
    order = sorted(asked, key=key.__getitem__)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(order) >= size:
        batches[-1] = order[-size:]
    return [[place for sequence in batch for place in asked[sequence]] for batch in batches]
