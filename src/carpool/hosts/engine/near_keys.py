"""Keys that look like one of Carpool's and are none: whoever wrote them gets no sharing, and hears of it."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import Any

from carpool.hosts.engine.log import log

NEAR = 0.75  # of `difflib`: a letter or two
SHOWN = 40  # characters of a key
_said: set[str] = set()  # in this process, of requests


@functools.lru_cache(maxsize=1024)  # requests bring the same ones again and again
def near(key: str, known: tuple[str, ...]) -> str | None:
    """Which of our keys somebody may have meant by a key that is none of them; None for other people's keys.

    Args:
        key: what was written.
        known: ours, the shortest first.
    """
    if key in known:
        return None
    found = difflib.get_close_matches(key.lower(), known, n=1, cutoff=NEAR)
    return found[0] if found else known[0] if key.lower().startswith(known[0]) else None


def warn(keys: Iterable[Any], known: tuple[str, ...], where: str, once: bool = False) -> None:
    """Say of every key that is near one of ours which one it is near.

    Args:
        keys: that somebody wrote.
        known: see `near`.
        where: they were written.
        once: a process for each of our keys.
    """
    for key in keys:
        meant = near(key, known) if isinstance(key, str) else None
        if meant is None or (once and meant in _said):
            continue
        if once:
            _said.add(meant)
        log().warning(
            "carpool: %s has a key %r, which does nothing; if Carpool's is meant, write %r", where, key[:SHOWN], meant
        )
