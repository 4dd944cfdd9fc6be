"""When an artefact is made, and by which version."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """Date and time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def version() -> str:
    """Carpool's."""
    import carpool

    return carpool.__version__
