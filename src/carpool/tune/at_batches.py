"""The chosen plan at other batch sizes than it was searched for, and what it saves beyond quantised experts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan
from carpool.tune.families import uniform
from carpool.tune.target import Target
from carpool.tune.trials import Point, Trials

LEAST_KL = 1e-12  # nats, of a plan that changes nothing


@dataclass(frozen=True)
class AtBatch:
    """A plan at one batch size, on text that the search did not see.

    Attributes:
        batch: sequences that decode together.
        point: what was measured; None where the text holds too little, which `why` says.
        met: whether the target holds.
        uniform: share of stock's bytes with which all experts at one number of bits lose as little, interpolated in log
            KL between two numbers of bits; None where they do not reach it, or no planes are there.
    """

    batch: int
    point: Point | None
    met: bool = False
    uniform: float | None = None
    why: str = ""


def at_batches(
    plan: Plan,
    target: Target,
    sizes: Sequence[int],
    trials: Callable[[int], Trials],
    depths: Sequence[int],
    top_k: int,
) -> list[AtBatch]:
    """The plan at every batch size.

    Args:
        trials: on unseen text, by batch size; may raise CarpoolError where that does not hold enough.
        depths: at which the experts are stored, ascending; empty without planes.
        top_k: experts a token.
    """
    found = []
    for size in sizes:
        try:
            measured = trials(size)
        except CarpoolError as error:
            found.append(AtBatch(size, None, why=str(error)))
            continue
        (point,) = measured.measure([plan])
        rivals: list[Point] = []
        for depth in sorted(depths, reverse=True):  # until one loses more
            rivals += measured.measure([uniform(depth, top_k)])
            if rivals[-1].kl > point.kl:
                break
        met = target.met(point.kl, point.perplexity_ratio, point.share)
        found.append(AtBatch(size, point, met, needed(point.kl, rivals)))
    return found


def needed(kl: float, rivals: Sequence[Point]) -> float | None:
    """Share of bytes at which the line through the rivals in log KL has this KL; None where it lies beyond their ends.

    Args:
        rivals: from many bits to few.
    """
    for deep, shallow in pairwise(rivals):
        if deep.kl <= kl <= shallow.kl:
            ends = [log(max(one, LEAST_KL)) for one in (deep.kl, shallow.kl)]
            if ends[0] == ends[1]:
                return shallow.share
            part = (log(max(kl, LEAST_KL)) - ends[0]) / (ends[1] - ends[0])
            return deep.share + part * (shallow.share - deep.share)
    return None
