"""Whose answer stands, the weak model's or the strong one's: a gate on the weak one's confidence, calibrated on items.

The gate is Mowst's (arXiv 2311.05185): `C = G(D)`, `D` signals of dispersion (`models.confidence`), `G` rising in each.
Here `G` is fitted, not trained along: with several signals a logistic regression with weights of 0 and more makes one
score of them, and isotonic regression turns that into a probability.

Shapes: `N` items, `S` signals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError

FEWEST = 40  # items to calibrate on; a half of them chooses a cut, the other says what it is worth
FOLDS = 2
STEPS = 500  # of the logistic regression


@dataclass(frozen=True)
class Gate:
    """Non-decreasing confidence that the weak answer is no worse than the strong one.

    Attributes:
        weights: of each signal in the score, 0 or more.
        scores: ascending, where the confidence steps up.
        values: the confidence from each of them on, in [0, 1], non-decreasing; below the first it is `values[0]`.
        cut: the score from which the weak answer stands.
        kept: share of the calibration items that stand.
        loss: share of right answers lost there against the strong model on all.
        gain: share of right answers above a random choice at equal cost, on items that did not choose the cut.
        error: standard error of `gain`.
    """

    weights: tuple[float, ...]
    scores: tuple[float, ...]
    values: tuple[float, ...]
    cut: float
    kept: float
    loss: float
    gain: float
    error: float

    def score(self, signals_NS: Tensor) -> Tensor:
        """The signals as one score, `[N]` float64."""
        signals_NS = _table(signals_NS)
        if signals_NS.shape[1] != len(self.weights):
            raise CarpoolError(f"{signals_NS.shape[1]} signals for a gate of {len(self.weights)}; give the same")
        return signals_NS @ torch.tensor(self.weights, dtype=torch.float64)

    def confidence(self, signals_NS: Tensor) -> Tensor:
        """Mowst's `C`, `[N]` in [0, 1]."""
        steps = torch.tensor(self.scores, dtype=torch.float64)
        place_N = (torch.searchsorted(steps, self.score(signals_NS), right=True) - 1).clamp_min(0)
        return torch.tensor(self.values, dtype=torch.float64)[place_N]

    def keep(self, signals_NS: Tensor) -> Tensor:
        """Where the weak answer stands, bool `[N]`."""
        return self.score(signals_NS) >= self.cut

    def draw(self, signals_NS: Tensor, generator: torch.Generator) -> Tensor:
        """`drawn` by this gate's confidence, bool `[N]`."""
        return drawn(self.confidence(signals_NS), generator)

    @classmethod
    def calibrate(
        cls,
        signals_NS: Tensor,
        weak_right_N: Tensor,
        strong_right_N: Tensor,
        *,
        max_loss: float = 0.01,
        max_cost: float | None = None,
        cost_N: Tensor | None = None,
        level: float = 0.95,
        seed: int = 0,
    ) -> Gate:
        """A gate whose cut passes as few items on as it may.

        The cut is chosen on one half of the items and judged on the other, both ways: `gain` and `error` come from
        items that had no say in it.

        Args:
            signals_NS: of the weak answers, `[N, S]` or `[N]`.
            weak_right_N, strong_right_N: how good each answer is, bool or in [0, 1].
            max_loss: share of right answers that may be lost against the strong model on all items.
            max_cost: instead of that, the most that passing on may cost, as a mean over all items.
            cost_N: of each strong answer, such as its tokens; default: 1, so that `max_cost` is a share of items.
            level: how sure it has to be that the gate beats random.

        Raises:
            CarpoolError: too few items; one model is as good for all of them; the signals do not beat a random choice
                of as many items.
        """
        signals_NS, weak_N, strong_N = _table(signals_NS), weak_right_N.double(), strong_right_N.double()
        items = len(signals_NS)
        if not (len(weak_N) == len(strong_N) == items) or items < FEWEST:
            raise CarpoolError(f"a gate is calibrated on {FEWEST} items or more with both answers; given: {items}")
        for name, value in (("max_loss", max_loss), ("level", level)):
            if not 0 <= value <= 1:
                raise CarpoolError(f"{name}={value!r}: give a share, 0 to 1")
        if max_cost is not None and not max_cost >= 0:
            raise CarpoolError(f"max_cost={max_cost!r}: give a number, 0 or more")
        costs_N = torch.ones_like(weak_N) if cost_N is None else cost_N.double()
        weights = _weights(signals_NS, weak_N >= strong_N)
        score_N = signals_NS @ torch.tensor(weights, dtype=torch.float64)
        cut, kept_N = _cut(score_N, strong_N - weak_N, costs_N, max_loss, max_cost)
        kept = float(kept_N.double().mean())
        if kept == 0 and max_cost is not None:
            raise CarpoolError(f"max_cost={max_cost} is enough for every item: use the strong model alone")
        if kept == 0:
            raise CarpoolError(f"no weak answer may stand at max_loss={max_loss}: use the strong one alone")
        if kept == 1 and max_cost is not None:
            raise CarpoolError(f"max_cost={max_cost} leaves all to the weak model; give a larger one or another signal")
        if kept == 1:
            raise CarpoolError("every answer of the weak model may stand: use it alone, without a gate")
        gain_N = _held_out(score_N, strong_N - weak_N, costs_N, max_loss, max_cost, seed)
        gain, error = float(gain_N.mean()), float(gain_N.std()) / math.sqrt(items)
        if gain <= NormalDist().inv_cdf(level) * error:
            raise CarpoolError(
                f"the gate does not beat a random choice at equal cost ({gain:+.4f} of right answers, standard "
                f"error {error:.4f}, {items} items): give another signal or more items, or use one of the models alone"
            )
        scores, values = isotonic(score_N, (weak_N >= strong_N).double())
        return cls(weights, scores, values, cut, kept, float((kept_N * (strong_N - weak_N)).mean()), gain, error)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, in one piece."""
        import json

        from carpool.artefacts.files import write_text

        write_text(path, json.dumps({"schema": 1, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Raises CarpoolError unless the file is a gate."""
        from carpool.artefacts.json_text import read_json

        found = read_json(path, "the gate")
        try:
            if found.pop("schema") != 1:
                raise TypeError
            made: dict[str, Any] = {
                name: tuple(map(float, found.pop(name))) for name in ("weights", "scores", "values")
            }
            gate = cls(**made | {name: float(value) for name, value in found.items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CarpoolError(f"{path} is no gate of this version; make it again") from None
        rising = all(list(numbers) == sorted(numbers) for numbers in (gate.scores, gate.values))
        if not (rising and len(gate.scores) == len(gate.values) >= 1 and gate.weights and min(gate.weights) >= 0):
            raise CarpoolError(f"{path} is no gate: its confidence does not rise with its signals; make it again")
        return gate


def drawn(confidence_N: Tensor, generator: torch.Generator) -> Tensor:
    """Mowst's Algorithm 1: the weak answer stands where `q < C`, q uniform, bool `[N]`."""
    return torch.rand(confidence_N.shape, generator=generator, dtype=torch.float64) < confidence_N


def isotonic(score_N: Tensor, target_N: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The non-decreasing step function closest to the targets (pool adjacent violators): where it steps, to what."""
    by_score: dict[float, list[float]] = {}  # equal scores have one value
    for score, target in zip(score_N.tolist(), target_N.tolist(), strict=True):
        by_score.setdefault(score, []).append(target)
    blocks: list[tuple[float, float, int]] = []  # first score, sum of targets, items
    for score, targets in sorted(by_score.items()):
        total, count = sum(targets), len(targets)
        while blocks and blocks[-1][1] * count >= total * blocks[-1][2]:
            score, before, items = blocks.pop()
            total, count = total + before, count + items
        blocks.append((score, total, count))
    return tuple(first for first, _, _ in blocks), tuple(total / count for _, total, count in blocks)


def _cut(
    score_N: Tensor, better_N: Tensor, cost_N: Tensor, max_loss: float, max_cost: float | None
) -> tuple[float, Tensor]:
    """The score from which weak answers stand, and which do: as many as a loss allows, as few as a cost allows.

    Args:
        better_N: how much better the strong answer is.
    """
    order_N = score_N.argsort(descending=True, stable=True)
    ranked_N = score_N[order_N]
    if max_cost is None:
        allowed_N = better_N[order_N].cumsum(0) / len(score_N) <= max_loss + 1e-12
    else:
        allowed_N = (cost_N.sum() - cost_N[order_N].cumsum(0)) / len(score_N) <= max_cost + 1e-9
    last_N = torch.cat([ranked_N[1:] < ranked_N[:-1], torch.tensor([True])])  # items of one score stand or go together
    places = (allowed_N & last_N).nonzero().flatten()
    if max_cost is not None and float(cost_N.mean()) <= max_cost:
        places = places[:0]  # all may be passed on
    if not len(places):
        return math.inf, torch.zeros_like(score_N, dtype=torch.bool)
    cut = float(ranked_N[places[-1] if max_cost is None else places[0]])
    return cut, score_N >= cut


def _held_out(
    score_N: Tensor, better_N: Tensor, cost_N: Tensor, max_loss: float, max_cost: float | None, seed: int
) -> Tensor:
    """Of each item what the gate adds over a random choice at equal cost, `[N]`; its cut is the other half's."""
    fold_N = torch.randperm(len(score_N), generator=torch.Generator().manual_seed(seed)) % FOLDS
    gain_N = torch.zeros_like(score_N)
    for fold in range(FOLDS):
        here_N = fold_N == fold
        cut, _ = _cut(score_N[~here_N], better_N[~here_N], cost_N[~here_N], max_loss, max_cost)
        passed_N = (score_N[here_N] < cut).double()
        chance = (passed_N * cost_N[here_N]).sum() / cost_N[here_N].sum().clamp_min(1e-12)
        gain_N[here_N] = (passed_N - chance) * better_N[here_N]
    return gain_N


def _weights(signals_NS: Tensor, good_N: Tensor) -> tuple[float, ...]:
    """Weights of a logistic regression on the signals, none below 0; 1 for a single signal."""
    signals = signals_NS.shape[1]
    if signals == 1:
        return (1.0,)
    raw_S, shift = torch.zeros(signals, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.Adam([raw_S.requires_grad_(), shift.requires_grad_()], lr=0.05)
    for _ in range(STEPS):
        score_N = signals_NS @ torch.nn.functional.softplus(raw_S) + shift
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score_N, good_N.double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuple(torch.nn.functional.softplus(raw_S).tolist())


def _table(signals: Tensor | Sequence[float]) -> Tensor:
    """Signals `[N, S]` as float64; raises CarpoolError for NaN and other shapes."""
    table = torch.as_tensor(signals, dtype=torch.float64)
    table = table.unsqueeze(-1) if table.dim() == 1 else table
    if table.dim() != 2 or not bool(table.isfinite().all()):
        raise CarpoolError("signals of a gate are finite numbers, one row an item, one column a signal")
    return table
