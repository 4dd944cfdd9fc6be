"""Keys that rank experts: what is packed comes out again, and integers compare as the fields do, at their extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool import Batch, RouteSpec
from carpool.policies import Inputs
from carpool.policies.controls import DRAW
from carpool.routing.exact import MAX_ROWS, to_fixed
from carpool.routing.keys import (
    BLOCK,
    KEPT,
    MAX_EXPERTS,
    NATIVE,
    SCORE,
    TIE,
    TIER,
    UTILITY,
    preference_keys,
    side_by_side,
    tie_order,
    utility_keys,
)

EVERY_TIE = torch.arange(MAX_EXPERTS) * 1267 % MAX_EXPERTS  # what the tie field must hold, up to a shift


def test_fields_do_not_overlap() -> None:
    for fields in ((TIE, SCORE, KEPT, NATIVE), (TIE, UTILITY, TIER)):
        taken = [bit for field in fields for bit in range(field.shift, field.end)]
        assert taken == list(range(len(taken)))
        assert len(taken) <= 63
    with pytest.raises(AssertionError, match="64 bits"):
        side_by_side(12, 50, 2)


def test_the_largest_batch_fits() -> None:
    """`MAX_ROWS` rows of the largest weight, in every tier, with the tie of every expert."""
    largest = to_fixed(torch.tensor([1e9])).item() * MAX_ROWS
    assert largest < 1 << UTILITY.width
    for value in (0, 1, largest, DRAW):
        for tier in range(3):
            utility_GE = torch.full((1, MAX_EXPERTS), value)
            keys_GE = utility_keys(utility_GE, torch.full_like(utility_GE, tier))
            assert (keys_GE >= 0).all()
            assert torch.equal(UTILITY.of(keys_GE), utility_GE)
            assert (TIER.of(keys_GE) == tier).all()
            assert torch.equal(TIE.of(keys_GE)[0], tie_order(MAX_EXPERTS))
            assert torch.equal((TIE.of(keys_GE)[0] - 761) % MAX_EXPERTS, EVERY_TIE)
            assert len(keys_GE.unique()) == MAX_EXPERTS


def test_the_utility_of_the_largest_batch() -> None:
    """Summed for real: all rows vote with the largest weight for the first expert."""
    weights_NE = torch.tensor([[1e9, 15.0, 0.0]]).expand(MAX_ROWS, 3)
    native_NK = torch.zeros(MAX_ROWS, 1, dtype=torch.int32)
    inputs = Inputs(RouteSpec(top_k=1), weights_NE, weights_NE, native_NK, Batch.of(MAX_ROWS), {})
    utility_GE = inputs.utility(weights_NE)
    assert utility_GE.tolist() == [[to_fixed(torch.tensor(1e9)).item() * MAX_ROWS, 15 * 2**28 * MAX_ROWS, 0]]
    assert inputs.utility_rank(utility_GE).tolist() == [[0, 1, 2]]
    start_GE = torch.tensor([[False, False, True]])
    assert inputs.utility_rank(utility_GE, start_GE).tolist() == [[1, 2, 0]]


EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4028234663852886e38, -3.4028234663852886e38]


@given(
    scores=st.lists(st.sampled_from(EXTREMES) | st.floats(width=32, allow_nan=False, allow_infinity=False),
                    min_size=4, max_size=12),
    kept=st.none() | st.lists(st.booleans(), min_size=12, max_size=12),
    native=st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
)  # fmt: skip
def test_preferences_compare_as_their_fields(scores: list[float], kept: list[bool] | None, native: list[int]) -> None:
    """Against tuples: native, inside the model's groups, score, tie; and what is blocked comes after all, in order."""
    count = len(scores)
    kept_NE = None if kept is None else torch.tensor([kept[:count]])
    [keys] = preference_keys(torch.tensor([scores]), kept_NE, torch.tensor([native])).tolist()
    ties = tie_order(count).tolist()
    fields = [(e in native, kept is None or kept[e], scores[e], ties[e]) for e in range(count)]
    assert sorted(range(count), key=lambda e: keys[e]) == sorted(range(count), key=lambda e: fields[e])
    assert all(0 <= key < BLOCK for key in keys)
    assert max(keys) - BLOCK < 0
    keys_E = torch.tensor(keys)
    assert NATIVE.of(keys_E).tolist() == [e in native for e in range(count)]
    assert KEPT.of(keys_E).tolist() == [kept is not None and kept[e] for e in range(count)]
    assert TIE.of(keys_E).tolist() == ties


@given(
    values=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2**50 - 1]) | st.integers(0, 2**50 - 1)),
                    min_size=2, max_size=12)
)  # fmt: skip
def test_utilities_compare_as_their_fields(values: list[tuple[int, int]]) -> None:
    tiers, utilities = zip(*values, strict=True)
    [keys] = utility_keys(torch.tensor([utilities]), torch.tensor([tiers])).tolist()
    ties = tie_order(len(values)).tolist()
    fields = [(*value, tie) for value, tie in zip(values, ties, strict=True)]
    assert sorted(range(len(keys)), key=lambda e: keys[e]) == sorted(range(len(keys)), key=lambda e: fields[e])
