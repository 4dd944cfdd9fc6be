"""The offload file: all experts of a model as the kernels read them, each in one piece that can be read directly.

It begins with a header, the units of scales and a checksum of every piece; see `geometry` for the rest. It is made once
from a checkpoint in planes, and only read after that: any number of processes may share it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.files import atomic_path, require_file
from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError
from carpool.kernels.experts import build
from carpool.kernels.experts.layout import Experts
from carpool.offloading.geometry import Geometry, padded

MAGIC = b"CARPOOL-OFFLOAD\x02"
HEADER = 1 << 20  # bytes of a header at most
CLOSED = -1
AGAIN = "delete it, and it is made again"


def write_store(path: Path, geometry: Geometry, source: str, layers: Iterable[tuple[int, Experts]]) -> None:
    """Write an offload file in one piece.

    Args:
        source: checksum of the file that it is made from. layers: each with its place among those of the geometry, one
            at a time.

    Raises:
        CarpoolError: the disk is full or says no; nothing is left then.
    """
    header = json.dumps({"geometry": geometry.as_json(), "source": source}).encode()
    E = geometry.experts
    units_LE2 = torch.zeros(len(geometry.layers), E, 2)
    sums_LEX = torch.zeros(len(geometry.layers), E, _pieces(geometry), dtype=torch.int64)
    first = _first_record(len(header), geometry)
    _clear_stale(path)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held until this process ends, in whatever way
        os.posix_fallocate(
            file.fileno(), 0, first + len(geometry.layers) * E * geometry.record
        )  # a full disk says so now
        for place, experts in layers:
            file.seek(first + place * E * geometry.record)
            units_LE2[place] = torch.stack([experts.into.unit_E, experts.out.unit_E], -1)
            for expert in range(E):
                pieces = list(_record(experts, expert, geometry))
                sums_LEX[place, expert] = torch.tensor([checksum([bytearray(piece)]) for piece in pieces])
                file.writelines(pieces)
        file.seek(0)
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        file.seek(_tables(len(header)))
        file.write(_bytes(units_LE2) + _bytes(sums_LEX))


def _clear_stale(path: Path) -> None:
    """Remove what writers left that were killed; those that still write hold a lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def checksum(parts: Sequence[bytearray | memoryview]) -> int:
    """Of some memory in blocks of 64 bytes, by the kernels' library, which lets other threads run meanwhile.

    Raises:
        CarpoolError: there are no kernels.
    """
    if not build.ready():
        raise CarpoolError("experts on disk are read by kernels, which cannot be built here; the log says why")
    return torch.ops.carpool.checksum([torch.frombuffer(part, dtype=torch.uint8) for part in parts])


def _pieces(geometry: Geometry) -> int:
    return len(geometry.depths) + geometry.deepest


def _tables(header: int) -> int:
    return padded(len(MAGIC) + 8 + header)


def _first_record(header: int, geometry: Geometry) -> int:
    return padded(_tables(header) + len(geometry.layers) * geometry.experts * (8 + 8 * _pieces(geometry)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _record(experts: Experts, expert: int, geometry: Geometry) -> Iterable[bytes]:
    parts = (experts.into, experts.out)
    for place in range(len(geometry.depths)):
        scales = b"".join(_bytes(part.scale_ELOG[expert, place]) for part in parts)
        yield scales.ljust(geometry.scale, b"\0")
    for plane in range(geometry.deepest):
        yield b"".join(
            _bytes(part.planes_EDB[expert, plane, :size]).ljust(padded(size), b"\0")
            for part, size in zip(parts, geometry.plane_bytes, strict=True)
        )


class Store:
    """An open offload file.

    Attributes:
        geometry: of what it holds. source: checksum of the file that it was made from.
        units_LE2: float32, the units of both projections' scales.
        direct: whether reads go past the operating system's cache of pages, which would hold the file twice.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises CarpoolError: missing, no offload file, damaged or truncated."""
        self.path = require_file(path)
        try:
            with self.path.open("rb") as file:
                start = file.read(len(MAGIC) + 8)
                length = int.from_bytes(start[len(MAGIC) :], "little")
                if start[: len(MAGIC)] != MAGIC or length > HEADER:
                    raise CarpoolError(f"{path} is no offload file of carpool; {AGAIN}")
                header: Any = parse_json(file.read(length).decode(errors="replace"), f"the header of {path}")
                try:
                    self.geometry = Geometry.parse(header.get("geometry") if isinstance(header, dict) else None)
                except CarpoolError as error:
                    raise CarpoolError(f"{path}: {error}; {AGAIN}") from None
                self.source = str(header.get("source"))
                L, E, pieces = len(self.geometry.layers), self.geometry.experts, _pieces(self.geometry)
                self._first = _first_record(length, self.geometry)
                size, wanted = self.path.stat().st_size, self._first + L * E * self.geometry.record
                if size != wanted:
                    raise CarpoolError(f"{path} is truncated: it has {size} of {wanted} bytes; {AGAIN}")
                file.seek(_tables(length))
                tables = bytearray(file.read(L * E * (8 + 8 * pieces)))
            self.units_LE2 = torch.frombuffer(tables, dtype=torch.float32, count=L * E * 2).reshape(L, E, 2)
            sums = torch.frombuffer(tables, dtype=torch.int64, offset=L * E * 8)
            self._sums: list[list[list[int]]] = sums.reshape(L, E, pieces).tolist()
            self._checked = [[[False] * pieces for _ in range(E)] for _ in range(L)]
            self._open()
        except OSError as error:
            raise CarpoolError(f"cannot read {path}: {error.strerror or error}") from None

    def _open(self) -> None:
        self._plain = self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that knows no direct reads
                raise
        self.direct = self._fd != self._plain and hasattr(os, "O_DIRECT")
        self._state = self._stat()

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._plain)
        return found.st_size, found.st_mtime_ns

    def trust(self) -> None:
        """Compare no checksums any more, as if everything had been read once."""
        self._checked = [[[True] * len(one) for one in layer] for layer in self._checked]

    def close(self) -> None:
        for fd in {self._fd, self._plain} - {CLOSED}:
            os.close(fd)
        self._fd = self._plain = CLOSED

    def read(
        self,
        place: int,
        expert: int,
        depth: int,
        scales: memoryview | None,
        start: int,
        planes: Sequence[memoryview],
    ) -> None:
        """Some of an expert's planes and a depth's scales, in one read where they lie behind each other.

        Args:
            place: of the layer among those of the file. depth: of the scales. scales: page-padded memory for those of
                both projections, one behind the other; None: for no scales. start: the first of the planes.
            planes: page-padded memory for each, of the first projection and of the second.

        Raises:
            CarpoolError: the file was changed, cut or damaged since it was opened, or the disk says no.
        """
        geometry = self.geometry
        if scales is None:
            self._read(place, expert, geometry.plane_at(start), planes)
        else:
            at = geometry.scale_at(depth)
            if planes and at + geometry.scale == geometry.plane_at(start):
                self._read(place, expert, at, [scales, *planes])
            else:
                self._read(place, expert, at, [scales])
                self._read(place, expert, geometry.plane_at(start), planes)
            self._check(place, expert, geometry.depths.index(depth), [scales])
        for plane in range(len(planes) // 2):
            index = len(geometry.depths) + start + plane
            self._check(place, expert, index, planes[2 * plane : 2 * plane + 2])

    def _read(self, place: int, expert: int, at: int, into: Sequence[memoryview]) -> None:
        at += self._first + (place * self.geometry.experts + expert) * self.geometry.record
        wanted = sum(map(len, into))
        try:
            read = self._preadv(into, at)
            while 0 < read < wanted:  # an interrupted read goes on
                more = self._preadv(_from(into, read), at + read)
                read = read + more if more else -1
            changed = self._stat() != self._state
        except OSError as error:
            raise CarpoolError(f"cannot read {self.path}: {error.strerror or error}") from None
        if changed or read != wanted:
            raise CarpoolError(f"{self.path} was changed while it was in use; {AGAIN}, and open the model anew")

    def _preadv(self, into: Sequence[memoryview], at: int) -> int:
        direct = self.direct
        try:
            read = os.preadv(self._fd if direct else self._plain, into, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = self.direct = False  # memory or file in pieces that this disk cannot read directly
            read = os.preadv(self._plain, into, at)
        if not direct:
            os.posix_fadvise(self._plain, at, read, os.POSIX_FADV_DONTNEED)
        return read

    def _check(self, place: int, expert: int, piece: int, held: Sequence[memoryview]) -> None:
        """Compare a piece with its checksum, the first time that it is read."""
        checked = self._checked[place][expert]
        if checked[piece]:
            return
        if checksum(held) != self._sums[place][expert][piece]:
            raise CarpoolError(f"{self.path} is damaged: a checksum differs; {AGAIN}")
        checked[piece] = True


def _from(into: Sequence[memoryview], start: int) -> list[memoryview]:
    """What is left of some memory after so many bytes, in whole pages."""
    left = []
    for one in into:
        if start < len(one):
            left.append(one[start:])
        start = max(0, start - len(one))
    return left
