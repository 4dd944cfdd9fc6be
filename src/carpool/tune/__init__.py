"""From "lose at most this much" to a policy file that reads as little as it can."""

from carpool.tune.families import DEFAULT, Family, bounded, family, measurable
from carpool.tune.search import Failed, Tuned, tune
from carpool.tune.target import Target
from carpool.tune.trials import Point, Trials

__all__ = [
    "DEFAULT",
    "Failed",
    "Family",
    "Point",
    "Target",
    "Trials",
    "Tuned",
    "bounded",
    "family",
    "measurable",
    "tune",
]
