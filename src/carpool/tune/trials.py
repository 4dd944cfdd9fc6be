"""Measures plans on one set of sequences, and remembers what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carpool.artefacts.files import write_text
from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.evaluate.intervals import estimate
from carpool.evaluate.layout import Layout
from carpool.evaluate.loop import Loop, MoE
from carpool.evaluate.measure import parts
from carpool.evaluate.measured import Measured
from carpool.evaluate.sequences import Sequences
from carpool.plans.policy_file import PolicyFile

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
        self.moe = moe
        passes = parts(model, sequences, layout, batches)
        self._loop = Loop(model, moe, layout, passes, sequences.domains, stats=stats, kept=KEPT)
        self._memory, self._settings, self._advance = memory, settings or {}, advance
        self.points: dict[str, Point] = self._remembered()

    def measure(self, candidates: Sequence[PolicyFile]) -> list[Point]:
        """Points of all candidates; those that are new a few at a time, and kept as soon as they are measured."""
        new = list({_key(one): one for one in candidates if _key(one) not in self.points}.values())
        for start in range(0, len(new), TOGETHER):
            few = new[start : start + TOGETHER]
            for point, candidate in zip(self._run(few), few, strict=True):
                self.points[_key(candidate)] = point
                self._advance(point.policy)
            self._remember()
        return [self.points[_key(one)] for one in candidates]

    def _run(self, candidates: Sequence[PolicyFile]) -> list[Point]:
        stock, *found = self._loop.run(candidates, allow_unchanged=True)
        return [self._point(one, measured, stock) for one, measured in zip(candidates, found, strict=True)]

    def _point(self, candidate: PolicyFile, one: Measured, stock: Measured) -> Point:
        kl = estimate(one.kl_M, one.tokens_M, "log")
        more = (one.nll_MD - stock.nll_MD).sum() / one.tokens_M.sum()
        return Point(
            policy=str(candidate.plan),
            layers=dict(candidate.layers),
            kl=kl.value,
            kl_low=kl.value if kl.low is None else kl.low,
            kl_high=kl.value if kl.high is None else kl.high,
            perplexity_ratio=float(np.exp(more)),
            share=float(one.layers["bytes"].sum() / stock.layers["bytes"].sum()),
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
