"""What the benchmarks of block diffusion compute before anything is timed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from carpool.hosts.transformers import attach


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    return importlib.import_module("moe_layers")


@pytest.mark.parametrize(("union", "found"), [(2, 4), (4, 4), (9, 9), (32, 32), (99, 32)])
def test_forced_ids_are_valid_and_have_the_union(layers: ModuleType, union: int, found: int) -> None:
    tiny = layers.LAYERS["tiny"]
    ids_NK = layers.spread(union, 32, tiny, torch.Generator().manual_seed(0))
    assert ids_NK.shape == (32, 4)
    assert all(len(row.unique()) == 4 for row in ids_NK)
    assert len(ids_NK.unique()) == found
    counts_E = ids_NK.flatten().bincount(minlength=32)
    assert int(counts_E.max()) - int(counts_E[counts_E > 0].min()) <= 1


@torch.inference_mode()
def test_blocks_wake_as_many_experts_as_was_published(layers: ModuleType) -> None:
    tiny = layers.LAYERS["tiny"]
    router: Any = attach(layers.build(tiny, torch.float32, 0)).layers[0].router
    inputs, alike, union = layers.blocks_alike(tiny, router, 32, torch.float32, 0)
    assert abs(union - tiny.union) < 1
    assert 0 < alike < 1
    assert [block.shape for block in inputs] == [(1, 32, tiny.hidden)] * layers.INPUTS
