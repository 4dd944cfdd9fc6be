"""Planners beside each other: planned on one window of a trace, scored on the next, and what can be recommended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.placement.baselines import linear_like
from carpool.placement.cost import CostModel, usable
from carpool.placement.dispatch import way
from carpool.placement.placement import Placement
from carpool.placement.planners import PLANNERS, Planner, Sizes, possible
from carpool.placement.score import Score, chosen, counts, score, score_of

WORTH = 0.01  # of what experts in order have; less than that is no reason to move weights
SMALLER = {  # what is compared, in words
    "peak_tokens": "tokens of the busiest device",
    "peak_activated": "experts that the busiest device reads",
    "fan_out": "devices that a token is sent to",
    "hops": "hops between layers",
}


@dataclass(frozen=True, eq=False)
class Row:
    """One planner.

    Attributes:
        planner, placement: what made what.
        own, later: scores on the window that it was planned on, and on the next.
        moved: experts' weights that devices get that had experts in order.
        micros: of a layer on the next window, under a cost model; None: there is none.
        unusable: why its objective cannot pay under the dispatch; empty where it can.
    """

    planner: Planner
    placement: Placement
    own: Score
    later: Score
    moved: int
    micros: float | None
    unusable: str


@dataclass(frozen=True)
class Advice:
    """What the rows come to, a sentence each: what to use, and what not and why."""

    use: tuple[str, ...]
    refused: tuple[str, ...]


def compare(
    trace: Trace, sizes: Sizes, dispatch: str, *, cost: CostModel | None = None,
    planners: Sequence[Planner] = PLANNERS, progress: Callable[[int], None] = lambda planners: None,
) -> list[Row]:  # fmt: skip
    """A row for every planner.

    Args:
        trace: of one phase; its first half is planned on, its second is scored.
        dispatch: of `carpool.placement.dispatch.WAYS`.
        cost: to predict times with. progress: told 1 after each planner.

    Raises:
        CarpoolError: sizes that do not fit, an unknown dispatch, a trace of one step.
    """
    way(dispatch)
    now, later = trace.windows(2)
    rows = []
    for one in possible(trace.num_experts, sizes, planners):
        placement = one.make(now, sizes)
        start = linear_like(placement)
        replayed = chosen(placement, later, one.rule)
        scored = score_of(placement, later, replayed)
        micros = None if cost is None else _micros(placement, later, replayed, cost, scored, dispatch)
        cause = usable(one.objective, dispatch, trace.top_k) if one.objective else ""
        rows.append(
            Row(one, placement, score(placement, now, one.rule), scored, placement.moved_from(start), micros, cause)
        )
        progress(1)
    return rows


def _micros(
    placement: Placement, trace: Trace, replayed: list[Tensor], cost: CostModel, scored: Score, dispatch: str
) -> float:
    rows_of_a_step = len(trace) / len(list(trace.steps()))
    sent = scored.bytes_sent(dispatch, trace.facts.hidden_size) * rows_of_a_step / placement.devices
    layers = [cost.layer(activated, pairs, sent) for activated, pairs in counts(placement, trace, replayed)]
    return sum(layers) / len(layers)


def advise(rows: Sequence[Row], dispatch: str) -> Advice:
    """What pays under the dispatch on the window that nobody planned on, against the better of experts in order and at
    random; and every planner whose objective cannot pay, with the reason."""
    usable_rows = [row for row in rows if not row.unusable]
    baselines = [row for row in usable_rows if not row.planner.objective]
    use = []
    if all(row.micros is not None for row in rows):
        use.append(_best(usable_rows, baselines, "predicted microseconds of a layer", lambda row: row.micros or 0.0))
    else:
        for measure in way(dispatch).pays:
            value: Callable[[Row], float] = partial(_later, measure)
            use.append(_best(usable_rows, baselines, SMALLER[measure], value))
    refused = [f"{row.planner.name} is not recommended: {row.unusable}" for row in rows if row.unusable]
    return Advice(tuple(use), tuple(refused))


def _later(measure: str, row: Row) -> float:
    return float(getattr(row.later, measure))


def _best(rows: Sequence[Row], baselines: Sequence[Row], what: str, value: Callable[[Row], float]) -> str:
    best, base = min(rows, key=value), min(baselines, key=value)
    saved = 1 - value(best) / value(base) if value(base) else 0.0
    if saved < WORTH:
        return f"{what}: nothing is better than {base.planner.name} ({value(base):.2f}) on the next window"
    return (
        f"{what}: {best.planner.name}, {value(best):.2f} where {base.planner.name} has {value(base):.2f} "
        f"({saved:.0%} less, on the next window)"
    )
