"""Experts on disk: writers that are killed, processes that share a file, what is pinned, and checksums."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_offload_runtime import DEPTHS, E, H, I, K, L, layers, open_, path, steps, whole  # noqa: F401

from carpool import CarpoolError
from carpool.kernels.experts import build
from carpool.kernels.experts.layout import Experts
from carpool.kernels.experts.operation import read_experts
from carpool.offloading.geometry import Geometry
from carpool.offloading.rules import Lru
from carpool.offloading.store import Store, write_store

pytestmark = pytest.mark.skipif(not build.ready(), reason="no compiler for the kernels")
HERE = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"


def run(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HERE + code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_writer_that_is_killed_leaves_no_file_and_a_later_one_works(
    tmp_path: Path,
    layers: list[Experts],  # noqa: F811
) -> None:
    """What it leaves under another name goes when somebody writes again, but not while it still writes."""
    target = tmp_path / "experts.offload"
    code = """
from pathlib import Path
import torch
from carpool.kernels.experts import build
from carpool.offloading.geometry import Geometry
from carpool.offloading.store import write_store
from test_offload_runtime import DEPTHS, E, H, I
def half():
    layer = torch.load(sys.argv[2], weights_only=False)
    yield 0, layer
    print("half", flush=True)
    input()
build.ready()
write_store(Path(sys.argv[1]), Geometry((0, 1, 4), E, H, I, 32, DEPTHS), "abc", half())
"""
    torch.save(layers[0], tmp_path / "layer.pt")
    writer = run(code, target, tmp_path / "layer.pt")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    geometry = Geometry((0, 1, 4), E, H, I, 32, DEPTHS)
    write_store(target, geometry, "abc", enumerate(layers))
    assert len(list(tmp_path.glob(".*.tmp"))) == 1, "it still writes"
    target.unlink()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not target.exists()
    write_store(target, geometry, "abc", enumerate(layers))
    assert not list(tmp_path.glob(".*.tmp"))
    Store(target).close()


def test_two_processes_share_one_file(path: Path, layers: list[Experts]) -> None:  # noqa: F811
    code = """
import hashlib
from pathlib import Path
from test_offload_runtime import open_, steps, whole
opened, found = open_(Path(sys.argv[1]), 4), hashlib.sha256()
print("ready", flush=True)
for place, hidden_NH, ids_NK, weights_NK in steps(40):
    found.update(opened.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK)).numpy().tobytes())
print(found.hexdigest())
"""
    other = run(code, path)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    opened = open_(path, 6)
    import hashlib

    mine, want = hashlib.sha256(), hashlib.sha256()
    for place, hidden_NH, ids_NK, weights_NK in steps(40):
        mine.update(opened.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK)).numpy().tobytes())
        want.update(read_experts(hidden_NH, ids_NK, weights_NK, whole(ids_NK), layers[place]).numpy().tobytes())
    opened.close()
    assert other.stdout.read().strip() == mine.hexdigest() == want.hexdigest()
    other.wait()


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_what_is_pinned_never_leaves_and_is_never_read_shallow(path: Path, scope: str) -> None:  # noqa: F811
    pinned = [(0, 3), (2, 9), (2, 1)]
    opened = open_(path, 12, Lru(), "depth(2)", scope=scope, pinned=pinned)
    for place, hidden_NH, ids_NK, weights_NK in steps(20):
        opened.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK))
        assert [int(opened.resident_LE[one]) for one in pinned] == [DEPTHS[-1]] * 3
        assert all(pool.paged <= pool.capacity for pool in opened.memory.pools)
    assert opened.totals.hits < opened.totals.uses
    opened.close()
    with pytest.raises(CarpoolError, match="there is no expert 10 of"):
        open_(path, 12, pinned=[(0, 10)])
    with pytest.raises(CarpoolError, match="holds nothing but the experts that are pinned"):
        open_(path, 3, pinned=pinned)


def test_a_checksum_is_what_its_twin_says_and_sees_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in (64, 256)]

    def twin() -> int:
        mask, odd = 2**64 - 1, 0x9E3779B97F4A7C15
        lanes = [odd * (lane + 1) & mask for lane in range(8)]

        def mixed(value: int, word: int) -> int:
            value ^= word
            return ((value << 27 | value >> 37) & mask) * odd & mask

        content = b"".join(bytes(part.tolist()) for part in parts)
        for at in range(0, len(content), 8):
            lanes[at // 8 % 8] = mixed(lanes[at // 8 % 8], int.from_bytes(content[at : at + 8], "little"))
        total = 0
        for lane in lanes:
            total = mixed(total, lane)
        return total - 2**64 if total >= 2**63 else total

    right = torch.ops.carpool.checksum(parts)
    assert right == twin()
    for part in parts:
        for bit in range(0, 8 * len(part), 7):
            part[bit // 8] ^= 1 << bit % 8
            assert torch.ops.carpool.checksum(parts) != right
            part[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RuntimeError, match="blocks of 64"):
        torch.ops.carpool.checksum([parts[0][:63]])
