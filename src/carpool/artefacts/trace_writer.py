"""Writes a trace part by part."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from carpool.artefacts.growing import GrowingFile
from carpool.artefacts.trace import Trace, trace_metadata
from carpool.errors import CarpoolError


class TraceWriter:
    """Appends parts of a trace to a file, which appears in one piece when the block ends without an error.

    Attributes:
        rows: written so far.

    Raises:
        CarpoolError: a path that cannot be written to; at the end, no part.
    """

    def __init__(self, path: str | Path) -> None:
        self.rows = 0
        self._file = GrowingFile(path)
        self._last: Trace | None = None

    def __enter__(self) -> TraceWriter:
        self._file.__enter__()
        return self

    def add(self, part: Trace) -> None:
        """Append rows.

        Raises:
            CarpoolError: they are of another model, or of a step before the last one.
        """
        last = self._last
        if last is not None and part.facts != last.facts:
            raise CarpoolError("the parts of a trace are of different models or texts")
        if last is not None and int(part.step_T[0]) < int(last.step_T[-1]):
            raise CarpoolError("the parts of a trace are not in the order of their steps")
        self._file.append(part.tensors())
        self._file.metadata = trace_metadata(part.facts, self._file.digests)
        self.rows += len(part)
        self._last = part.select(slice(-1, None))

    def __exit__(self, kind: type[BaseException] | None, *rest: BaseException | TracebackType | None) -> None:
        self._file.__exit__(kind, *rest)
