"""The checksum of a statistics file, over its metadata and its tensors in the order of their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from carpool.artefacts.identity import tensor_bytes
from carpool.errors import CarpoolError


class Checksum:
    """Tensors are added one at a time, so that a file need not fit into memory."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor, in the order of their names."""
        self._digest.update(name.encode())
        self._digest.update(tensor_bytes(tensor))

    def check(self, expected: str, path: str | Path, remedy: str) -> None:
        """Raises CarpoolError where the file says another one."""
        if expected != self.hex:
            raise CarpoolError(f"{path} is damaged: its checksum differs; {remedy} or fetch the file anew")

    @property
    def hex(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()


def checksum_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Checksum:
    """Of a whole file."""
    found = Checksum(metadata)
    for name in sorted(tensors):
        found.add(name, tensors[name])
    return found
