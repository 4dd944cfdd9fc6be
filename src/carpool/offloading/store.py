"""The offload file: all experts of a model as the kernels read them, each in one piece that can be read directly.

It begins with a header, the units of scales and a checksum of every piece; see `geometry` for the rest. It is made once
from a checkpoint in planes, and only read after that: any number of processes may share it.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.files import atomic_path, require_file
from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError
from carpool.kernels.experts.layout import Experts
from carpool.offloading.geometry import Geometry, padded

MAGIC = b"CARPOOL-OFFLOAD\x01"
HEADER = 1 << 20  # bytes of a header at most
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
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        os.posix_fallocate(
            file.fileno(), 0, first + len(geometry.layers) * E * geometry.record
        )  # a full disk says so now
        for place, experts in layers:
            file.seek(first + place * E * geometry.record)
            units_LE2[place] = torch.stack([experts.into.unit_E, experts.out.unit_E], -1)
            for expert in range(E):
                pieces = list(_record(experts, expert, geometry))
                sums_LEX[place, expert] = torch.tensor([zlib.crc32(piece) for piece in pieces])
                file.writelines(pieces)
        file.seek(0)
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        file.seek(_tables(len(header)))
        file.write(_bytes(units_LE2) + _bytes(sums_LEX))


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
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that knows no direct reads
                raise
            self._fd, self.direct = os.open(self.path, os.O_RDONLY), False
        self._state = self._stat()

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_scales(self, place: int, expert: int, depth: int, into: memoryview) -> None:
        """A depth's scales of both projections, one behind the other; arguments and errors as of `read_planes`."""
        index = self.geometry.depths.index(depth)
        self._read(place, expert, self.geometry.scale_at(depth), [into])
        self._check(place, expert, index, [into])

    def read_planes(self, place: int, expert: int, start: int, into: Sequence[memoryview]) -> None:
        """Planes of an expert from `start` on, each of the first projection and of the second.

        Args:
            place: of the layer among those of the file. into: page-padded memory for each piece.

        Raises:
            CarpoolError: the file was changed, cut or damaged since it was opened, or the disk says no.
        """
        self._read(place, expert, self.geometry.plane_at(start), into)
        for plane in range(len(into) // 2):
            index = len(self.geometry.depths) + start + plane
            self._check(place, expert, index, into[2 * plane : 2 * plane + 2])

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
        try:
            read = os.preadv(self._fd, into, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            self.direct = False  # memory or file in pieces that this disk cannot read directly
            self._fd, old = os.open(self.path, os.O_RDONLY), self._fd
            os.close(old)
            read = os.preadv(self._fd, into, at)
        if not self.direct:
            os.posix_fadvise(self._fd, at, read, os.POSIX_FADV_DONTNEED)
        return read

    def _check(self, place: int, expert: int, piece: int, held: Sequence[memoryview]) -> None:
        """Compare a piece with its checksum, the first time that it is read."""
        checked = self._checked[place][expert]
        if checked[piece]:
            return
        found = 0
        for one in held:
            found = zlib.crc32(one, found)
        if found != self._sums[place][expert][piece]:
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
