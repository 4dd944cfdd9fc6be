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
from carpool.evaluate.intervals import FEWEST, estimate
from carpool.evaluate.layout import Layout
from carpool.evaluate.loop import Loop, MoE
from carpool.evaluate.measure import parts
from carpool.evaluate.measured import Measured
from carpool.evaluate.sequences import Sequences
from carpool.plans.grammar import Plan

KEPT = 1 << 29  # bytes of stock's logits that are kept from one step of a search to the next
TOGETHER = 4  # plans beside one run of stock, where that is not kept; an interruption loses as many


@dataclass(frozen=True)
class Point:
    """A measured plan.

    Attributes:
        policy: its text.
        kl, kl_low, kl_high: KL(stock || policy), nats a decoded token, with its 95 % interval.
        perplexity_ratio: over stock's. share: what it reads over what stock reads.
    """

    policy: str
    kl: float
    kl_low: float
    kl_high: float
    perplexity_ratio: float
    share: float


class Trials:
    """Plans measured on the same batches; each only once, also after an interruption.

    Args:
        model: a transformers model. moe: its numbers. stats: its statistics.
        sequences: `FEWEST` batches of the layout or more.
        memory: file that keeps the points, or None. settings: what they depend on; other settings begin anew.
        advance: told every measured plan.

    Raises:
        CarpoolError: fewer batches, which do not show how sure a measurement is.
    """

    def __init__(
        self,
        model: Any,
        moe: MoE,
        sequences: Sequences,
        layout: Layout,
        *,
        stats: Any = None,
        memory: Path | None = None,
        settings: dict[str, Any] | None = None,
        advance: Callable[[str], None] = lambda policy: None,
    ) -> None:
        if sequences.batches < FEWEST:
            raise CarpoolError(
                f"{sequences.batches} batches do not show how sure a measurement is: search and verify on {FEWEST} or "
                "more (--tokens)"
            )
        self.moe = moe
        passes = parts(model, sequences, layout, sequences.batches)
        self._loop = Loop(model, moe, layout, passes, sequences.domains, stats=stats, kept=KEPT)
        self._memory, self._settings, self._advance = memory, settings or {}, advance
        self.points: dict[str, Point] = self._remembered()

    def measure(self, plans: Sequence[Plan]) -> list[Point]:
        """Points of all plans; those that are new a few at a time, and kept as soon as they are measured."""
        new = list({str(one): one for one in plans if str(one) not in self.points}.values())
        for start in range(0, len(new), TOGETHER):
            for point in self._run(new[start : start + TOGETHER]):
                self.points[point.policy] = point
                self._advance(point.policy)
            self._remember()
        return [self.points[str(one)] for one in plans]

    def _run(self, plans: Sequence[Plan]) -> list[Point]:
        stock, *found = self._loop.run(plans, allow_unchanged=True)
        return [_point(one, stock) for one in found]

    def _remembered(self) -> dict[str, Point]:
        if self._memory is None or not self._memory.exists():
            return {}
        try:
            content = read_json(self._memory)
            if content["settings"] != json.loads(json.dumps(self._settings)):
                return {}
            return {entry["policy"]: Point(**entry) for entry in content["points"]}
        except (CarpoolError, KeyError, TypeError):
            raise CarpoolError(f"{self._memory} is no progress of `carpool tune`; delete it to begin anew") from None

    def _remember(self) -> None:
        if self._memory is not None:
            content = {"settings": self._settings, "points": [asdict(point) for point in self.points.values()]}
            write_text(self._memory, json.dumps(content) + "\n")


def _point(one: Measured, stock: Measured) -> Point:
    kl = estimate(one.kl_M, one.tokens_M, "log")
    assert kl.low is not None
    assert kl.high is not None
    more = (one.nll_MD - stock.nll_MD).sum() / one.tokens_M.sum()
    return Point(
        policy=one.name,
        kl=kl.value,
        kl_low=kl.low,
        kl_high=kl.high,
        perplexity_ratio=float(np.exp(more)),
        share=float(one.layers["bytes"].sum() / stock.layers["bytes"].sum()),
    )
