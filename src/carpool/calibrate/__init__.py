"""Measure how similar a model's experts are: `carpool calibrate`."""

from carpool.calibrate.run import calibrate
from carpool.calibrate.sequences import token_sequences

__all__ = ["calibrate", "token_sequences"]
