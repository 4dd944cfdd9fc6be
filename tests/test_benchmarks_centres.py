"""The benchmark of shared centres: hidden units may be permuted, and are matched where they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import tiny_model, tokens

from carpool.hosts.transformers import find_layers


@pytest.fixture
def centres(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import expert_centres

    yield expert_centres
    sys.modules.pop("expert_centres")


def test_permuted_units_are_the_same_expert(centres: ModuleType) -> None:
    model = tiny_model("qwen3_moe")
    with torch.inference_mode():
        before = model(tokens()).logits
        for layer in find_layers(model):
            units_EIX = centres.clouds(layer)
            order_I = torch.randperm(units_EIX.shape[1], generator=torch.Generator().manual_seed(0))
            centres.write_back(layer, units_EIX[:, order_I])
        torch.testing.assert_close(model(tokens()).logits, before)


def test_copies_that_are_permuted_are_matched(centres: ModuleType) -> None:
    drawn = torch.Generator().manual_seed(0)
    one_IX = torch.randn(12, 9, generator=drawn)
    copies_EIX = torch.stack([one_IX[torch.randperm(12, generator=drawn)] for _ in range(5)])
    fitted_EIX = centres.aligned(copies_EIX)
    assert torch.equal(fitted_EIX, fitted_EIX[:1].expand_as(fitted_EIX))
    assert not torch.equal(copies_EIX, copies_EIX[:1].expand_as(copies_EIX))
    for how, lost in (("barycentre", False), ("mean", True)):
        found_EIX, whole_EIX = centres.restored(copies_EIX, how, 1)
        assert (float((found_EIX - whole_EIX).norm()) > 0.1) == lost, how


def test_all_are_of_one_size(centres: ModuleType) -> None:
    """Numbers that a layer stores: rests of a rank, and what is shared, to the nearest rank."""
    experts, inner, width = 64, 64, 768
    sizes = [
        experts * (16 + centres.spared(1 - count, experts, inner, width)) * (inner + width) + count * inner * width
        for count in (0, 1, centres.GROUPS)
    ]
    assert max(sizes) - min(sizes) <= experts * (inner + width)
