"""Kernels for GPUs that read experts at a depth: in Triton's interpreter against plain torch, and compiled ahead."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_read_experts import SHAPES, call, error, experts, gpt_oss, stored

pytest.importorskip("triton")
from carpool.kernels.experts import on_device, reference


@settings(max_examples=3, deadline=None)
@given(
    shape=st.integers(0, len(SHAPES) - 1), rows=st.sampled_from([0, 1, 5, 20]), top_k=st.integers(1, 3),
    clamped=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_every_pair_is_computed_at_its_depth(shape: int, rows: int, top_k: int, clamped: bool, seed: int) -> None:
    inputs, activation = call(shape, rows, top_k, seed), gpt_oss(shape) if clamped else None
    found = on_device.read_experts(*inputs, experts(shape, clamped))
    wanted = reference.read_experts(*inputs, stored(shape), activation)
    assert error(found, wanted) < 1e-5


@pytest.mark.slow
def test_many_rows_of_one_expert_fill_several_tiles() -> None:
    hidden, ids, weights, depth = call(1, 60, 1, 3)
    inputs = (hidden, ids * 0 + 2, weights, depth)
    found = on_device.read_experts(*inputs, experts(1, True))
    assert error(found, reference.read_experts(*inputs, stored(1), gpt_oss(1))) < 1e-5


@pytest.mark.slow
def test_a_row_hangs_on_nothing_but_the_row() -> None:
    hidden, ids, weights, depth = call(0, 20, 2, 5)
    whole = on_device.read_experts(hidden, ids, weights, depth, experts(0, False))
    for rows in (slice(3, 4), slice(7, 19)):
        part = on_device.read_experts(hidden[rows], ids[rows], weights[rows], depth[rows], experts(0, False))
        assert error(part, whole[rows]) < 1e-6  # a processor's product of matrices hangs on where a row stands in it
