"""Measures plans on one set of sequences, and remembers what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from carpool.artefacts.files import write_text
from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.evaluate.intervals import estimate, resample
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS, Pass, compare, forward
from carpool.evaluate.measure import MoE, explaining_memory, passes
from carpool.evaluate.sequences import Sequences
from carpool.plans.policy_file import AnyPlan, PolicyFile

BYTES = LAYER_FIELDS.index("bytes")
KEPT = 1 << 29  # bytes of stock's logits that are kept from one step of a search to the next
TOGETHER = 4  # plans beside one run of stock, where that is not kept; an interruption loses as many


@dataclass(frozen=True)
class Point:
    """A measured plan.

    Attributes:
        policy: its text. layers: settings of layers that differ.
        kl, kl_low, kl_high: KL(stock || policy), nats a decoded token, with its 95 % interval.
        perplexity_ratio: over stock's. share: what it reads over what stock reads.
    """

    policy: str
    layers: dict[int, dict[str, Any]]
    kl: float
    kl_low: float
    kl_high: float
    perplexity_ratio: float
    share: float


@dataclass(frozen=True, eq=False)
class Stock:
    """What stock does in one pass: logits `[R, V]`, the text's next tokens and their losses `[R]`, bytes read `[M]`."""

    logits_RV: Tensor
    targets_R: Tensor
    nll_R: Tensor
    read_M: Tensor


class Trials:
    """Plans measured on `batches` batches of a layout; each only once, also after an interruption.

    Args:
        model: a transformers model. moe: its numbers. stats: its statistics.
        sequences: at least `batches * layout.batch_size` of them.
        memory: file that keeps the points, or None. settings: what they depend on; other settings begin anew.
        advance: told every measured plan.
    """

    def __init__(
        self,
        model: Any,
        moe: MoE,
        sequences: Sequences,
        layout: Layout,
        batches: int,
        *,
        stats: Any = None,
        memory: Path | None = None,
        settings: dict[str, Any] | None = None,
        seed: int = 0,
        advance: Callable[[str], None] = lambda policy: None,
    ) -> None:
        self.model, self.moe, self.stats, self.layout = model, moe, stats, layout
        self._passes = passes(model, sequences, layout, batches)
        self._stock: dict[int, Stock] = {}
        self._counts_RM = resample(batches, seed)
        self._memory, self._settings, self._advance = memory, settings or {}, advance
        self.points: dict[str, Point] = self._remembered()

    def measure(self, candidates: Sequence[PolicyFile]) -> list[Point]:
        """Points of all candidates; those that are new a few at a time, and kept as soon as they are measured."""
        new = list({_key(one): one for one in candidates if _key(one) not in self.points}.values())
        for start in range(0, len(new), TOGETHER):
            few = new[start : start + TOGETHER]
            with explaining_memory(self.layout):
                found = self._run(few)
            for point, candidate in zip(found, few, strict=True):
                self.points[_key(candidate)] = point
                self._advance(point.policy)
            self._remember()
        return [self.points[_key(one)] for one in candidates]

    def _run(self, candidates: Sequence[PolicyFile]) -> list[Point]:
        layout = self.layout
        sums: list[list[Any]] = [[] for _ in candidates]
        for place, (ids_SX, _) in enumerate(self._passes):
            stock = self._stock.get(place) or self._run_stock(place)
            for mine, candidate in zip(sums, candidates, strict=True):
                run = self._forward(candidate, ids_SX)
                found = compare(stock.logits_RV, run.logits_RV, stock.targets_R)
                kl_M, more_M = (
                    rows_R.view(-1, layout.batch_size * layout.decoded).sum(1).cpu()
                    for rows_R in (found.kl_R, found.nll_R - stock.nll_R)
                )
                mine.append(np.stack([kl_M, more_M, run.layers_LFM[:, BYTES].sum(0).cpu(), stock.read_M]))
        return [self._point(one, np.concatenate(mine, axis=1)) for one, mine in zip(candidates, sums, strict=True)]

    def _run_stock(self, place: int) -> Stock:
        """Stock in one pass; kept where all passes together are small enough."""
        ids_SX, _ = self._passes[place]
        run = self._forward(self.moe.stock, ids_SX)
        targets_R = ids_SX[:, self.layout.prefill + 1 :].flatten().to(run.logits_RV.device)
        nll_R = compare(run.logits_RV, run.logits_RV, targets_R).nll_R
        made = Stock(run.logits_RV, targets_R, nll_R, run.layers_LFM[:, BYTES].sum(0).cpu())
        if run.logits_RV.nbytes * len(self._passes) <= KEPT:
            self._stock[place] = made
        return made

    def _forward(self, plan: AnyPlan, ids_SX: Tensor) -> Pass:
        return forward(self.model, plan, ids_SX[:, :-1], self.layout, num_layers=self.moe.layers, stats=self.stats)

    def _point(self, candidate: PolicyFile, sums_XM: Any) -> Point:
        kl_M, more_M, read_M, stock_M = sums_XM
        tokens_M = np.full(len(kl_M), float(self.layout.batch_size * self.layout.decoded))
        kl = estimate(kl_M, tokens_M, self._counts_RM)
        return Point(
            policy=str(candidate.plan),
            layers=dict(candidate.layers),
            kl=kl.value,
            kl_low=kl.value if kl.low is None else kl.low,
            kl_high=kl.value if kl.high is None else kl.high,
            perplexity_ratio=float(np.exp(more_M.sum() / tokens_M.sum())),
            share=float(read_M.sum() / stock_M.sum()),
        )

    def _remembered(self) -> dict[str, Point]:
        if self._memory is None or not self._memory.exists():
            return {}
        try:
            content = read_json(self._memory)
            if content["settings"] != json.loads(json.dumps(self._settings)):
                return {}
            points = [Point(**entry) for entry in content["points"]]
        except (CarpoolError, KeyError, TypeError):
            raise CarpoolError(f"{self._memory} is no progress of `carpool tune`; delete it to begin anew") from None
        made = {}
        for point in points:
            layers = {int(index): settings for index, settings in point.layers.items()}
            made[json.dumps([point.policy, layers], sort_keys=True)] = Point(**{**asdict(point), "layers": layers})
        return made

    def _remember(self) -> None:
        if self._memory is not None:
            content = {"settings": self._settings, "points": [asdict(point) for point in self.points.values()]}
            write_text(self._memory, json.dumps(content) + "\n")


def _key(candidate: PolicyFile) -> str:
    return json.dumps([str(candidate.plan), candidate.layers], sort_keys=True)
