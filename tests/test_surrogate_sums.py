"""The sum of surrogates from the stored numbers: pair by pair as from all experts at once, and split over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from carpool.calibrate.surrogate_fit import stored
from carpool.experts.surrogates import NAMES, SCALES, Surrogates, by_pairs, stored_part

HOW = ("int8", "bf16", "fp32")


def some(how: str, experts: int, rank: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inner_ERH = torch.randn(experts, rank, width, generator=generator)
    outer_EXH = torch.randn(experts, rank + 1, width, generator=generator)
    return stored(dict(zip(NAMES, (inner_ERH, outer_EXH), strict=True)), how)


def pairs(rows: int, slots: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Half of the slots mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids_NX = torch.randint(0, experts, (rows, slots), generator=generator, dtype=torch.int32)
    weights_NX = torch.rand(rows, slots, generator=generator)
    return ids_NX, weights_NX * (torch.rand(rows, slots, generator=generator) < 0.5)


def by_loop(tensors: dict[str, Tensor], hidden_NH: Tensor, ids_NX: Tensor, weights_NX: Tensor) -> Tensor:
    inner, outer = (
        tensors[name].double() * (tensors[scale].double().unsqueeze(-1) if scale in tensors else 1)
        for name, scale in zip(NAMES, SCALES, strict=True)
    )
    sums_NH = torch.zeros(hidden_NH.shape, dtype=torch.float64)
    for row, hidden_H in enumerate(hidden_NH.double()):
        for expert, weight in zip(ids_NX[row].tolist(), weights_NX[row].tolist(), strict=True):
            given_H = outer[expert, -1].clone()
            for i, inner_H in enumerate(inner[expert]):
                given_H += outer[expert, i] * (inner_H @ hidden_H)
            sums_NH[row] += weight * given_H
    return sums_NH


@given(
    how=st.sampled_from(HOW), experts=st.integers(1, 6), rank=st.integers(1, 4), rows=st.integers(1, 5),
    slots=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_three_ways_to_one_sum(how: str, experts: int, rank: int, rows: int, slots: int, seed: int) -> None:
    tensors = some(how, experts, rank, 8, seed)
    ids_NX, weights_NX = pairs(rows, slots, experts, seed)
    hidden_NH = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    expected_NH = by_loop(tensors, hidden_NH, ids_NX, weights_NX)
    given_ = [tensors[name] for name in (*NAMES, *SCALES) if name in tensors]
    for found_NH in (
        by_pairs(hidden_NH, ids_NX, weights_NX, *given_),
        Surrogates.of(tensors)(hidden_NH, ids_NX, weights_NX),
    ):
        assert found_NH.dtype == torch.float32
        torch.testing.assert_close(found_NH.double(), expected_NH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_parts_of_all_ranks_add_up(how: str, world: int) -> None:
    """Also where there are more ranks than rows of a map to give them."""
    tensors = some(how, experts=5, rank=4, width=8, seed=1)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    ids_NX, weights_NX = pairs(7, 3, 5, seed=2)
    hidden_NH = torch.randn(7, 8, generator=torch.Generator().manual_seed(3))
    parts = [stored_part(tensors, rank, world) for rank in range(world)]
    sums = [Surrogates.of(part)(hidden_NH, ids_NX, weights_NX) for part in parts]
    torch.testing.assert_close(sum(sums), Surrogates.of(tensors)(hidden_NH, ids_NX, weights_NX), rtol=1e-4, atol=1e-4)
    assert sum(part[NAMES[0]].shape[1] for part in parts) == 4  # nobody holds what another one holds
    assert {part[NAMES[0]].dtype for part in parts} == {tensors[NAMES[0]].dtype}
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
