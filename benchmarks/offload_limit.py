"""A limit of memory for this process, pages of files included: what maps files is held to it like everything else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "carpool-offload-benchmark"
ROOM = 256 << 20  # bytes for all that is no expert and no weight: activations, tables of pages


def _own() -> tuple[Path, str]:
    """This process's control group of memory, and its file of the limit."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
    return Path("/sys/fs/cgroup") / lines[0][2].lstrip("/"), "memory.max"


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """In the block this process and its children take at most so many bytes beside what they have; `ROOM` comes on top.

    Needs root, or a control group that is this process's own. Yields the group.
    """
    own, name = _own()
    group = own / NAME
    group.mkdir(exist_ok=True)
    try:
        (group / name).write_text(str(size + ROOM))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """In the block what opens files of this one's disk reads ahead so many KiB; needs root.

    What maps files depends on it: at 128, Linux's default, it waits for every piece; at the megabytes that some
    machines come with it reads neighbours that nobody asked for.
    """
    device = path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def forget(path: Path) -> None:
    """Let the system's cache drop a file: what is read of it counts for whoever reads it."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
