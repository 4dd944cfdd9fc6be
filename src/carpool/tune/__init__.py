"""From "lose at most this much" to a policy file that reads as little as it can."""

from carpool.tune.at_batches import AtBatch, at_batches
from carpool.tune.families import DEFAULT, Family, bounded, family, measurable, on_planes
from carpool.tune.search import Failed, Tuned, tune
from carpool.tune.target import Target
from carpool.tune.trials import Point, Trials

__all__ = [
    "DEFAULT",
    "AtBatch",
    "Failed",
    "Family",
    "Point",
    "Target",
    "Trials",
    "Tuned",
    "at_batches",
    "bounded",
    "family",
    "measurable",
    "on_planes",
    "tune",
]
