"""Safetensors files whose tensors grow row by row: what is recorded for hours does not have to fit into memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from carpool.artefacts.files import atomic_path, require_writable
from carpool.artefacts.identity import tensor_bytes
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"uint8": "U8", "int16": "I16", "int32": "I32", "float16": "F16"}  # safetensors' names
ALIGNED = 8  # bytes


class GrowingFile:
    """Appends rows to tensors; the file appears in one piece when the block ends without an error.

    Until then what was written so far lies in unnamed files beside it: on disk it takes its size twice.

    Attributes:
        metadata: of the file; set it before the block ends.

    Raises:
        CarpoolError: a path that cannot be written to; at the end, nothing that was appended.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = require_writable(path, ".safetensors")
        self.metadata: dict[str, str] = {}
        self._stack = ExitStack()
        self._spools: dict[str, _Spool] = {}

    def __enter__(self) -> GrowingFile:
        return self

    @property
    def digests(self) -> dict[str, str]:
        """Hex sha256 of what every tensor holds by now."""
        return {name: spool.digest.hexdigest() for name, spool in self._spools.items()}

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Append rows to every tensor.

        Raises:
            CarpoolError: other names, dtypes or shapes of a row than before; the disk says no.
        """
        if not self._spools:
            try:
                self._spools = {name: _Spool(self._stack, self.path, one) for name, one in tensors.items()}
            except OSError as error:
                raise CarpoolError(f"cannot write {self.path}: {error.strerror or error}") from error
        shapes = {name: (spool.dtype, spool.row) for name, spool in self._spools.items()}
        given = {name: (one.dtype, list(one.shape[1:])) for name, one in tensors.items()}
        if shapes != given:
            raise CarpoolError(f"rows of {given} do not follow rows of {shapes}")
        try:
            for name, tensor in tensors.items():
                self._spools[name].append(tensor)
        except OSError as error:
            raise CarpoolError(f"cannot write {self.path}: {error.strerror or error}") from error

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                self._assemble()

    def _assemble(self) -> None:
        if not self._spools:
            raise CarpoolError(f"nothing was recorded, so that {self.path} is not written")
        entries: dict[str, Any] = {"__metadata__": self.metadata}
        begin = 0
        order = sorted(self._spools, key=lambda name: (-self._spools[name].dtype.itemsize, name))  # keeps all aligned
        for name in order:
            spool = self._spools[name]
            end = begin + spool.file.tell()
            dtype, shape = DTYPES[str(spool.dtype).removeprefix("torch.")], [spool.rows, *spool.row]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % ALIGNED)
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                self._spools[name].file.seek(0)
                shutil.copyfileobj(self._spools[name].file, file, 1 << 20)


class _Spool:
    """What one tensor holds by now."""

    def __init__(self, stack: ExitStack, path: Path, example: Tensor) -> None:
        self.file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=path.resolve().parent))  # noqa: SIM115
        self.dtype, self.row = example.dtype, list(example.shape[1:])
        self.digest, self.rows = hashlib.sha256(), 0

    def append(self, tensor: Tensor) -> None:
        data = tensor_bytes(tensor)
        self.digest.update(data)
        self.file.write(data)
        self.rows += len(tensor)


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hex sha256 of tensors that were read, as `GrowingFile.digests` of the same rows."""
    return {name: hashlib.sha256(tensor_bytes(one)).hexdigest() for name, one in tensors.items()}
