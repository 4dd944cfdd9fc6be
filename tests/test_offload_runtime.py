"""Experts on disk: the same bits as in memory, whatever leaves and comes back; and what happens to broken files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from carpool import CarpoolError
from carpool.experts.rounding import nested_round
from carpool.experts.stored import StoredExperts
from carpool.kernels.experts import build
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import Experts
from carpool.kernels.experts.operation import read_experts
from carpool.offloading import store as store_module
from carpool.offloading.accesses import above, lockstep, shares
from carpool.offloading.cache import Scope
from carpool.offloading.geometry import Geometry
from carpool.offloading.misses import Misses
from carpool.offloading.rules import Lfu, Lru, Rule
from carpool.offloading.runtime import Offloaded
from carpool.offloading.simulate import simulate
from carpool.offloading.store import Store, write_store
from carpool.routing.spec import ALL_BITS

L, E, K, H, I = 3, 10, 3, 96, 64  # noqa: E741
DEPTHS = (2, 3, 6)
pytestmark = pytest.mark.skipif(not build.ready(), reason="no compiler for the kernels")


@pytest.fixture(scope="module")
def layers() -> list[Experts]:
    generator = torch.Generator().manual_seed(0)

    def planes(rows: int, width: int):
        return nested_round(torch.randn(E, rows, width, generator=generator) / 9, DEPTHS)

    return [Experts.of(StoredExperts(planes(2 * I, H), planes(H, I))) for _ in range(L)]


@pytest.fixture
def path(tmp_path: Path, layers: list[Experts]) -> Path:
    made = tmp_path / "experts.offload"
    write_store(made, Geometry((0, 1, 4), E, H, I, 32, DEPTHS), "abc", enumerate(layers))
    return made


ONE = Geometry((0,), E, H, I, 32, DEPTHS).read(0, 6)


def open_(path: Path, experts: float, rule: Rule | None = None, on_miss: str = "exact", **given: object) -> Offloaded:
    misses, capacity = Misses.parse(on_miss), int(experts * ONE)
    given = {"scope": "model", **given}
    return Offloaded(Store(path), capacity, rule or Lru(), misses, [Activation()] * L, **given)  # type: ignore[arg-type]


def steps(count: int, rows: int = 1, seed: int = 0) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for place in range(L):
            ids_NK = torch.rand(rows, E, generator=generator).topk(K, -1).indices
            weights_NK = torch.rand(rows, K, generator=generator)
            yield place, torch.randn(rows, H, generator=generator), ids_NK, weights_NK


def whole(ids_NK: torch.Tensor) -> torch.Tensor:
    return torch.full_like(ids_NK, ALL_BITS, dtype=torch.int32)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(
    ("experts", "scope"), [(1.5, "model"), (8, "model"), (4, "layer"), (12, "layer"), (40, "layer")]
)
def test_exact_is_the_same_bits_as_resident(
    path: Path, layers: list[Experts], rows: int, experts: float, scope: str
) -> None:
    """With a memory for less than a token's experts, for some layers, and for all."""
    foretold = torch.arange(6)
    opened = open_(path, experts, foretell=lambda place, hidden_NH: foretold.tolist(), scope=scope)
    try:
        for place, hidden_NH, ids_NK, weights_NK in steps(6, rows):
            weights_NK[0, 0] = 0
            for dtype in (torch.float32, torch.bfloat16):
                x = hidden_NH.to(dtype)
                want = read_experts(x.float(), ids_NK, weights_NK, whole(ids_NK), layers[place])
                assert torch.equal(opened.read(place, x, ids_NK, weights_NK, whole(ids_NK)), want)
            assert opened.memory.used <= opened.memory.capacity
            assert all(pool.used <= pool.paged <= pool.capacity for pool in opened.memory.pools)
    finally:
        opened.close()


@pytest.mark.parametrize("rule", [Lru(), Lfu()])
@pytest.mark.parametrize(("capacity", "scope"), [(4, "model"), (9, "model"), (9, "layer"), (15, "layer")])
def test_the_runtime_misses_what_the_simulator_says(path: Path, rule: Rule, capacity: int, scope: Scope) -> None:
    opened, rows = open_(path, capacity, rule, scope=scope), list(steps(12))
    for place, hidden_NH, ids_NK, weights_NK in rows:
        opened.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK))
    opened.close()
    accesses = lockstep([torch.stack([ids_NK[0] for _, _, ids_NK, _ in rows]).reshape(12, L, K)], E)
    found = simulate(accesses, rule, capacity if scope == "model" else capacity // L, scope=scope)
    assert opened.totals.uses == int(found.uses_SL.sum())
    assert opened.totals.uses - opened.totals.hits == int(found.misses_SL.sum())
    assert opened.bytes_read == ONE * int(found.misses_SL.sum())


def test_lossy_reads_less_and_within_the_floor(path: Path, layers: list[Experts]) -> None:
    tau = 0.35
    opened, exact = open_(path, 5, on_miss=f"depth([6, 3, 2], [0.3, 0.6]) | floor({tau})"), open_(path, 5)
    for place, hidden_NH, ids_NK, weights_NK in steps(10, rows=2):
        for one in (opened, exact):
            made_NH = one.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK))
        want = read_experts(hidden_NH, ids_NK, weights_NK, whole(ids_NK), layers[place])
        assert not torch.equal(want, torch.zeros_like(want))
        assert torch.equal(made_NH, want)
        for pool in opened.memory.pools:
            assert pool.used <= pool.paged <= pool.capacity
    assert opened.bytes_read < exact.bytes_read
    opened.close()
    exact.close()


@pytest.mark.parametrize("text", ["depth(2)", "depth([6, 3], [0.4])", "depth([3, 2], [0.2]) | floor(0.4)"])
def test_no_row_reads_more_of_its_weight_shallow_than_the_floor(text: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weights_NK = torch.rand(200, 5, generator=generator)
    weights_NK[:20, 2] = 0
    held_NK = torch.tensor([0, 0, 2, 3, 6])[torch.randint(5, (200, 5), generator=generator)]
    misses, most_NK = Misses.parse(text), torch.full((200, 5), 6)
    wanted_NK = misses.wanted(weights_NK, held_NK, most_NK)
    share_NK = shares(weights_NK, weights_NK != 0)
    shallow_N = (share_NK * (wanted_NK < 6) * (weights_NK != 0)).sum(-1)
    assert float(shallow_N.max()) <= misses.tau + 1e-6
    assert bool((wanted_NK >= held_NK)[weights_NK != 0].all()), "what is held deeper stays"
    assert not wanted_NK[weights_NK == 0].any()
    if misses.tau == 1:
        first = misses.shares[0] if misses.shares else -1
        plain_NK = torch.where(above(share_NK) <= first, misses.depths[0], misses.depths[-1])
        assert torch.equal(wanted_NK, torch.where(weights_NK != 0, torch.maximum(plain_NK, held_NK), 0))
    else:  # and no more is read whole than that takes
        least_N = torch.where((wanted_NK == 6) & (held_NK < 6), share_NK, torch.inf).amin(-1)
        raised_N = least_N.isfinite()
        assert bool(((shallow_N + least_N)[raised_N] > misses.tau - 1e-6).all())


def test_what_weighs_least_is_left_out_unless_it_is_there(path: Path, layers: list[Experts]) -> None:
    opened = open_(path, 40, on_miss="depth([6, 0], [0.5])")
    hidden_NH, ids_NK = torch.randn(1, H, generator=torch.Generator().manual_seed(4)), torch.tensor([[1, 4, 7]])
    weights_NK, left_NK = torch.tensor([[0.4, 0.2, 0.4]]), torch.tensor([[0.5, 0.0, 0.5]])
    for wanted_NK in (left_NK, left_NK):
        made_NH = opened.read(0, hidden_NH, ids_NK, weights_NK, whole(ids_NK))
        want_NH = read_experts(hidden_NH, ids_NK, wanted_NK, whole(ids_NK), layers[0])
        torch.testing.assert_close(made_NH, want_NH)
    assert opened.resident_LE[0, [1, 4, 7]].tolist() == [6, 0, 6]
    opened.read(0, hidden_NH, torch.tensor([[4, 1, 7]]), torch.tensor([[0.8, 0.1, 0.1]]), whole(ids_NK))
    made_NH = opened.read(0, hidden_NH, ids_NK, weights_NK, whole(ids_NK))
    assert torch.equal(made_NH, read_experts(hidden_NH, ids_NK, weights_NK, whole(ids_NK), layers[0]))
    opened.close()


def test_what_was_read_shallow_is_deepened_when_nothing_else_is_read(path: Path, layers: list[Experts]) -> None:
    opened = open_(path, 40, on_miss="depth(2)", deepen=True)
    hidden_NH, ids_NK, weights_NK = torch.randn(1, H), torch.tensor([[1, 4, 7]]), torch.ones(1, K)
    for _ in range(30):
        opened.settle()
        made_NH = opened.read(0, hidden_NH, ids_NK, weights_NK, whole(ids_NK))
    assert opened.resident_LE[0, [1, 4, 7]].tolist() == [6, 6, 6]
    assert torch.equal(made_NH, read_experts(hidden_NH, ids_NK, weights_NK, whole(ids_NK), layers[0]))
    opened.close()


def test_a_policy_says_how_deep_a_miss_is_read(path: Path, layers: list[Experts]) -> None:
    opened = open_(path, 40)
    _, hidden_NH, ids_NK, weights_NK = next(steps(1))
    depth_NK = torch.tensor([[3, 0, 6]], dtype=torch.int32)
    made_NH = opened.read(0, hidden_NH, ids_NK, weights_NK, depth_NK)
    assert torch.equal(made_NH, read_experts(hidden_NH, ids_NK, weights_NK, depth_NK, layers[0]))
    assert opened.resident_LE[0, ids_NK[0]].tolist() == [3, 0, 6]
    opened.close()


def test_two_readers_of_one_file_in_a_process(path: Path, layers: list[Experts]) -> None:
    one, two = open_(path, 4), open_(path, 6)
    for place, hidden_NH, ids_NK, weights_NK in steps(3):
        want = read_experts(hidden_NH, ids_NK, weights_NK, whole(ids_NK), layers[place])
        assert all(torch.equal(o.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK)), want) for o in (one, two))
    one.close()
    two.close()


def first_read(opened: Offloaded, place: int = 0) -> None:
    _, hidden_NH, ids_NK, weights_NK = next(steps(1))
    opened.read(place, hidden_NH, ids_NK, weights_NK, whole(ids_NK))


def test_a_file_that_is_cut_is_refused_when_it_is_opened(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CarpoolError, match=rf"is truncated: it has {size - 1} of {size} bytes; delete it"):
        Store(path)
    for content in (b"", b"CARPOOL-OFFLOAD\x02" + b"\xff" * 8, b"CARPOOL-OFFLOAD\x02\x02\0\0\0\0\0\0\0{}"):
        path.write_bytes(content)
        with pytest.raises(CarpoolError, match=r"no offload file|does not say which experts"):
            Store(path)


def test_a_file_that_is_cut_or_changed_while_it_is_open_is_refused(path: Path) -> None:
    for change in (lambda: os.utime(path, ns=(1, 1)), lambda: os.truncate(path, path.stat().st_size // 2)):
        opened = open_(path, 40)
        first_read(opened)
        change()
        with pytest.raises(CarpoolError, match="was changed while it was in use"):
            first_read(opened, place=1)
        opened.close()


def test_a_damaged_file_is_noticed_when_it_is_read(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(content.find(b"\0" * 4096) + 8192, len(content), 1000):
        content[at] ^= 1
    path.write_bytes(content)
    opened = open_(path, 40)
    with pytest.raises(CarpoolError, match="is damaged: a checksum differs"):
        first_read(opened)
    assert int((opened.resident_LE > 0).sum()) == 0 or opened.memory.used <= opened.memory.capacity
    opened.close()


def test_a_full_disk_leaves_nothing(tmp_path: Path, layers: list[Experts], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "posix_fallocate", full)
    with pytest.raises(CarpoolError, match=r"cannot write .*: No space left on device"):
        write_store(tmp_path / "x.offload", Geometry((0, 1, 4), E, H, I, 32, DEPTHS), "", enumerate(layers))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_knows_no_direct_reads_is_read_otherwise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.preadv, []

    def picky(fd: int, into: list[memoryview], at: int) -> int:
        if not seen:
            seen.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, into, at)

    monkeypatch.setattr(store_module.os, "preadv", picky)
    opened = open_(path, 40, threads=1)
    first_read(opened)
    assert not opened.store.direct
    opened.close()


def test_reads_that_are_interrupted_go_on(path: Path, layers: list[Experts], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(store_module.os, "preadv", lambda fd, into, at: real(fd, [into[0][:4096]], at))
    opened = open_(path, 40)
    _, hidden_NH, ids_NK, weights_NK = next(steps(1))
    want = read_experts(hidden_NH, ids_NK, weights_NK, whole(ids_NK), layers[0])
    assert torch.equal(opened.read(0, hidden_NH, ids_NK, weights_NK, whole(ids_NK)), want)
    opened.close()


def test_what_cannot_be_is_refused(path: Path) -> None:
    with pytest.raises(CarpoolError, match="a model holds no expert, which takes"):
        open_(path, 0.5)
    with pytest.raises(CarpoolError, match="a layer holds no expert, which takes"):
        open_(path, 2.9, scope="layer")
    with pytest.raises(CarpoolError, match=r"stored at .2, 3, 6. bits, not at 4"):
        open_(path, 40, on_miss="depth(4)")
    for text in (
        "depth",
        "depth()",
        "depth(3, 2)",
        "exact | floor",
        "depth([2, 3], [0.5])",
        "depth(3) | floor(2)",
        "depth(0)",
        "depth([])",
    ):
        with pytest.raises(CarpoolError, match="on_miss="):
            Misses.parse(text)
    opened = open_(path, 40)
    opened.close()
    with pytest.raises(CarpoolError, match="are on disk; open them"):
        first_read(opened)
