"""Kernels that read experts at a depth: against plain torch, row by row, kind of instruction by kind of instruction."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.experts.planes import Planes
from carpool.experts.stored import StoredExperts
from carpool.kernels.experts import build, reference
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import GAP, INPUTS, Experts, Lines, to_lines
from carpool.kernels.experts.operation import read_experts, reader
from carpool.routing.spec import ALL_BITS

SHAPES = [
    (4, 64, 32, 32, (2, 3, 4)),
    (5, 72, 40, 32, tuple(range(1, 9))),
    (3, 200, 100, 64, (2, 5, 8)),
    (6, 96, 160, 128, (3,)),
]


@cache
def stored(shape: int) -> StoredExperts:
    experts, hidden, inner, group, depths = SHAPES[shape]
    generator = torch.Generator().manual_seed(shape)

    def planes(rows: int, width: int) -> Planes:
        codes = torch.randint(0, 2 ** depths[-1], (experts, rows, width), generator=generator)
        scale = torch.rand(experts, rows, -(-width // group), generator=generator) + 0.5
        return Planes.of(codes, torch.stack([scale * 2.0**-depth for depth in depths]), depths, group)

    return StoredExperts(planes(2 * inner, hidden), planes(hidden, inner))


@cache
def gpt_oss(shape: int) -> Activation:
    experts, hidden, inner, _, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(9)
    biases = (torch.randn(experts, width, generator=generator) for width in (2 * inner, hidden))
    return Activation(True, 1.702, 7.0, *biases)


@cache
def experts(shape: int, clamped: bool) -> Experts:
    return Experts.of(stored(shape), gpt_oss(shape) if clamped else None)


def call(shape: int, rows: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with distinct experts, some of them left out, and a depth for every pair."""
    count, hidden, _, _, depths = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, count, generator=generator).argsort(-1)[:, :top_k].int()
    weights = torch.rand(rows, top_k, generator=generator) * (torch.rand(rows, top_k, generator=generator) > 0.1)
    depth = torch.tensor([0, ALL_BITS, *depths])[torch.randint(0, len(depths) + 2, (rows, top_k), generator=generator)]
    return torch.randn(rows, hidden, generator=generator), ids, weights, depth


def rounded(rows_NI: Tensor, group: int) -> Tensor:
    """Rows as the kernels see them: whole numbers up to 127 times a scale for each group."""
    parts = []
    for part_NI in rows_NI.float().split(group, -1):
        scale_N1 = part_NI.abs().amax(-1, keepdim=True) / 127
        parts.append((part_NI / scale_N1.clamp_min(1e-30)).round() * scale_N1)
    return torch.cat(parts, -1)


def twin(
    hidden: Tensor, ids: Tensor, weights: Tensor, depth: Tensor, shape: int, activation: Activation | None
) -> Tensor:
    """A pair at a time in float64, with rounded activations; sums what each row's terms are."""
    held, group, activation = stored(shape), SHAPES[shape][3], activation or Activation()
    result = torch.zeros_like(hidden, dtype=torch.float64)
    for n in range(len(ids)):
        for k in range(ids.shape[1]):
            bits, expert = int(depth[n, k]), int(ids[n, k])
            if not bits or not weights[n, k]:
                continue
            bits = held.depths[-1] if bits == ALL_BITS else bits
            wide = rounded(hidden[n : n + 1], group).double() @ held.into.read(bits)[expert].double().mT
            middle = rounded(activation(wide.float(), expert), group).double()
            made = middle @ held.out.read(bits)[expert].double().mT + activation.out_bias_of(expert)
            result[n] += weights[n, k].double() * made[0]
    return result


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9))


needs_kernels = pytest.mark.skipif(not build.ready(), reason="no C++ compiler or ninja")


@needs_kernels
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_compiled_layout_is_the_plain_one(shape: int) -> None:
    planes = stored(shape).into
    rows = torch.randperm(planes.planes_DERB.shape[2], generator=torch.Generator().manual_seed(shape))
    for order in (None, rows):
        for expert, lines_DB in enumerate(Lines.of(planes, order).planes_EDB):
            wanted = planes.planes_DERB[:, expert]
            assert torch.equal(lines_DB[:, :-GAP], to_lines(wanted if order is None else wanted[:, order]))


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    shape=st.integers(0, len(SHAPES) - 1), rows=st.integers(0, 40), top_k=st.integers(1, 3), clamped=st.booleans(),
    kind=st.sampled_from(build.instructions()), seed=st.integers(0, 999),
)  # fmt: skip
def test_every_pair_is_computed_at_its_depth(
    shape: int, rows: int, top_k: int, clamped: bool, kind: str, seed: int
) -> None:
    inputs, activation = call(shape, rows, top_k, seed), gpt_oss(shape) if clamped else None
    found = read_experts(*inputs, experts(shape, clamped), instructions=kind)
    assert found.shape == inputs[0].shape
    assert error(found, twin(*inputs, shape, activation)) < 2e-3  # a code at the border between two may be either
    assert error(found, reference.read_experts(*inputs, stored(shape), activation)) < 0.03  # 8 bits of activations


@needs_kernels
@pytest.mark.parametrize("kind", build.instructions())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_hangs_on_nothing_but_the_row(kind: str, dtype: torch.dtype) -> None:
    hidden, ids, weights, depth = call(1, 64, 3, 0)
    hidden, threads = hidden.to(dtype), torch.get_num_threads()
    whole = read_experts(hidden, ids, weights, depth, experts(1, False), instructions=kind)
    assert whole.dtype == dtype
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (torch.arange(64).flip(0), torch.arange(5, 23), *torch.arange(8).split(1)):
                part = [tensor[rows] for tensor in (hidden, ids, weights, depth)]
                assert torch.equal(read_experts(*part, experts(1, False), instructions=kind), whole[rows]), (
                    count,
                    rows,
                )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif("amx" not in build.instructions(), reason="no AMX on this processor")
@settings(max_examples=30, deadline=None)
@given(shape=st.integers(0, len(SHAPES) - 1), rows=st.integers(9, 90), bits=st.integers(0, 2), seed=st.integers(0, 99))
def test_many_rows_of_an_expert_are_the_same_bits(shape: int, rows: int, bits: int, seed: int) -> None:
    hidden, ids, weights, depth = call(shape, rows, 2, seed)
    depth = torch.where(depth > 0, SHAPES[shape][4][bits % len(SHAPES[shape][4])], 0)
    few, many = (
        read_experts(hidden, ids, weights, depth, experts(shape, False), instructions=kind)
        for kind in ("avx512", "amx")
    )
    assert torch.equal(few, many)


@needs_kernels
def test_kinds_of_instructions_agree() -> None:
    inputs = call(2, 33, 2, 3)
    found = [read_experts(*inputs, experts(2, True), instructions=kind) for kind in build.instructions()]
    assert all(error(other, found[0]) < 2e-3 for other in found[1:])


@needs_kernels
def test_what_is_not_there_is_refused() -> None:
    hidden, ids, weights, depth = call(0, 4, 2, 0)
    with pytest.raises(RuntimeError, match=r"experts are stored at \[2, 3, 4\] bits, not at 7"):
        read_experts(hidden, ids, torch.ones_like(weights), torch.full_like(depth, 7), experts(0, False))
    with pytest.raises(RuntimeError, match="expert 44 of 4"):
        read_experts(hidden, ids + 44 - ids, torch.ones_like(weights), torch.full_like(depth, 3), experts(0, False))
    with pytest.raises(RuntimeError, match="no kernels named sse9"):
        read_experts(hidden, ids, weights, depth, experts(0, False), instructions="sse9")


@pytest.mark.parametrize("clamped", [False, True])
def test_parts_of_ranks_sum_to_the_whole(clamped: bool) -> None:
    hidden, ids, weights, depth = call(0, 9, 2, 4)
    held = StoredExperts(stored(0).into, stored(0).out)
    activation = Activation(clamped, 1.702 * clamped, 7.0)
    wide = StoredExperts(_twice(held.into, rows=True), _twice(held.out, rows=False))
    whole = reference.read_experts(hidden, ids, weights, depth, wide, activation)
    parts = [
        reference.read_experts(hidden, ids, weights, depth, wide.part(rank, 2, clamped), activation) for rank in (0, 1)
    ]
    assert error(parts[0] + parts[1], whole) < 1e-6
    with pytest.raises(CarpoolError, match="64 neurons in groups of 32 cannot be split over 4 ranks"):
        wide.part(0, 4)


def _twice(planes: Planes, rows: bool) -> Planes:
    """Planes of twice as many rows, or inputs."""
    if rows:
        return replace(
            planes, planes_DERB=planes.planes_DERB.repeat(1, 1, 2, 1), scale_LERG=planes.scale_LERG.repeat(1, 1, 2, 1)
        )
    return replace(
        planes, planes_DERB=planes.planes_DERB.repeat(1, 1, 1, 2), scale_LERG=planes.scale_LERG.repeat(1, 1, 1, 2),
        width=2 * planes.width,
    )  # fmt: skip


def test_without_a_compiler_experts_are_read_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(build, "ready", build.ready.__wrapped__)
    with caplog.at_level(logging.WARNING, "carpool"):
        read = reader(stored(0))
    assert "reads experts in plain torch, which is slow: a C++ compiler (/nowhere/c++) is missing" in caplog.text
    inputs = call(0, 4, 2, 0)
    assert torch.equal(read(*inputs), reference.read_experts(*inputs, stored(0)))


def test_groups_that_kernels_cannot_read_are_read_in_plain_torch() -> None:
    codes = torch.randint(0, 16, (2, 32, 48), generator=torch.Generator().manual_seed(0))
    planes = Planes.of(codes, torch.ones(1, 2, 32, 3), (4,), 16)
    held = StoredExperts(planes, Planes.of(codes[:, :, :16].repeat(1, 2, 1)[:, :48], torch.ones(1, 2, 48, 1), (4,), 16))
    assert held.into.group % INPUTS
    inputs = (torch.randn(3, 48), torch.tensor([[0], [1], [0]]), torch.ones(3, 1), torch.full((3, 1), 4))
    assert torch.equal(reader(held)(*inputs), reference.read_experts(*inputs, held))


EMULATED = """
import sys, torch
from torch.utils import cpp_extension
from carpool.kernels.experts import build
from pathlib import Path
here = Path({here!r})
sources = [str(build.SOURCES / name) for name in ("operation.cpp", "avx2.cpp", "plain.cpp")]
sources.append(str(here / "emulated" / "avx512_emulated.cpp"))
cpp_extension.load("carpool_emulated", sources, is_python_module=False,
    extra_cflags=["-O1", "-ffp-contract=off", "-fopenmp", "-w", "-DCARPOOL_EMULATE", f"-I{{build.SOURCES}}"],
    build_directory={folder!r})
sys.path.insert(0, str(here))
build.ready = lambda: True
import test_read_experts as t
for shape in range(len(t.SHAPES)):
    for clamped in (False, True):
        inputs = t.call(shape, 29, 2, 7)
        one, other = (t.read_experts(*inputs, t.experts(shape, clamped), kind) for kind in ("avx512-emulated", "plain"))
        print(t.error(one, other))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/include/simde").is_dir(), reason="needs SIMDe (Debian: libsimde-dev)")
def test_emulated_avx512_gives_what_plain_loops_give(tmp_path: Path) -> None:
    code = EMULATED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2 * len(SHAPES)
    assert max(errors) < 2e-3
