"""Where a host says what an operator should hear: under a name that the engine's own logging shows."""

from __future__ import annotations

import logging

_names = ["carpool"]


def log() -> logging.Logger:
    """The logger of this process' engine."""
    return logging.getLogger(_names[-1])


def log_as(name: str) -> None:
    """From now on in this process; some engines show loggers of their own name only."""
    _names[:] = [name]
