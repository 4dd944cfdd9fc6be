"""Amounts of memory and speeds as people write them: `4GiB`, `500MB`, `2GB/s`."""

from __future__ import annotations

import re

from carpool.errors import CarpoolError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B(/s)?\s*", re.ASCII)


def bytes_of(text: str | int, what: str, *, speed: bool = False) -> int:
    """Bytes, or bytes a second.

    Args:
        text: such as `4GiB`, or `2GB/s` for a speed; a number is bytes. what: for the message.

    Raises:
        CarpoolError: it says no such amount, or none at all.
    """
    found = AMOUNT.fullmatch(text) if isinstance(text, str) else None
    size = text if isinstance(text, int) else int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size <= 0 or (found is not None and found[3] is not None and not speed):
        example = "2GB/s" if speed else "4GiB"
        raise CarpoolError(f"{what} {text}: give an amount above 0 with its unit, such as {example}")
    return size
