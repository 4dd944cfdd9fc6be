"""How a refusal ends where an engine's own command line runs: with its sentence, and without a traceback above it."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from carpool.errors import CarpoolError


def end_with_the_sentence(engine: str) -> None:
    """Let a `CarpoolError` that nobody catches end this process in one line, if the engine's command line runs in it.

    Somebody else's program keeps its traceback. The exit code stays that of an uncaught exception.

    Args:
        engine: name of its package and of its command.
    """
    if not runs_in(engine) or getattr(sys.excepthook, "carpool", False):
        return
    usual = sys.excepthook

    def ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, CarpoolError):
            print(f"carpool: {error}", file=sys.stderr, flush=True)
        else:
            usual(kind, error, trace)

    ended.carpool = True  # type: ignore[attr-defined]  # a function may carry a mark
    sys.excepthook = ended


def runs_in(engine: str) -> bool:
    """Whether the engine's command line runs in this process."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = getattr(spec, "name", None) or ""
    return module.startswith(f"{engine}.") or os.path.basename(sys.argv[0]) == engine  # noqa: PTH119
