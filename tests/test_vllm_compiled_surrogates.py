"""The compiled sum of surrogates in the vLLM host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_vllm_compiled import SPECS, E, H, K, a_layer
from torch import Tensor
from torch._dynamo.utils import counters

from carpool.calibrate.surrogate_fit import stored
from carpool.experts.surrogates import by_pairs
from carpool.hosts.engine import compiled
from carpool.hosts.engine.compiled import Compiler
from carpool.hosts.engine.resident import Resident
from carpool.hosts.engine.step_rows import Requests
from carpool.hosts.vllm.router import routed
from carpool.hosts.vllm.supplement import supplement


def check_sum(how: str) -> None:
    """Compiled surrogates of one layer serve another of the same sizes, and any number of rows."""
    generator = torch.Generator().manual_seed(0)
    layers = [a_layer("surrogate(budget=8)", SPECS["softmax"], "batch")[0] for _ in range(2)]
    for layer in layers:
        inner_ERH, outer_EXH = (torch.randn(E, 3 + more, H, generator=generator) for more in (0, 1))
        made = stored({"surrogate_in": inner_ERH, "surrogate_out": outer_EXH}, how)
        layer.resident = Resident(made, 0, 1, layer.device)
    compiler = Compiler("batch")
    compiler.use(layers, compile_new=True)
    first, second = (layer.resident for layer in layers)
    assert first is not None
    assert second is not None
    assert first.sum is second.sum is not None
    graphs = counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for count in (1, 2, 7, 40):
            hidden_NH = torch.randn(count, H, generator=generator).bfloat16()
            ids_NK = torch.randint(0, E, (count, K), generator=generator, dtype=torch.int32)
            weights_NK = torch.rand(count, K, generator=generator)
            weights_NK[weights_NK < 0.5] = 0
            found_NH = second(hidden_NH, ids_NK, weights_NK)
            torch.testing.assert_close(found_NH, second.whole()(hidden_NH, ids_NK, weights_NK), rtol=1e-4, atol=1e-4)
            assert found_NH.any()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("how", ["int8", "bf16"])
def test_compiled_surrogates_are_the_same(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    check_sum(how)


@pytest.mark.slow
def test_really_compiled_surrogates_are_the_same() -> None:
    check_sum("int8")


@pytest.mark.parametrize("how", ["int8", "bf16"])
def test_without_a_compiler_few_pairs_read_their_own_maps(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two it is depends on shapes alone, as a recorded graph needs; both give the same."""
    generator = torch.Generator().manual_seed(0)
    inner_ERH, outer_EXH = (torch.randn(E, 3 + more, H, generator=generator) for more in (0, 1))
    resident = Resident(stored({"surrogate_in": inner_ERH, "surrogate_out": outer_EXH}, how), 0, 1, torch.device("cpu"))
    whole, wholes = resident.whole, []
    monkeypatch.setattr(resident, "whole", lambda: wholes.append(1) or whole())
    for count in (1, 3, E // K, 40):
        hidden_NH = torch.randn(count, H, generator=generator)
        ids_NK = torch.randint(0, E, (count, K), generator=generator, dtype=torch.int32)
        weights_NK = torch.rand(count, K, generator=generator)
        wholes.clear()
        found_NH = resident(hidden_NH, ids_NK, weights_NK)
        assert bool(wholes) == (count * K >= E)
        torch.testing.assert_close(found_NH, whole()(hidden_NH, ids_NK, weights_NK), rtol=1e-4, atol=1e-4)


def test_only_rows_that_share_are_computed() -> None:
    """Rows of a prompt leave nothing; what the others get is the same with and without them."""
    layer, rows = a_layer("surrogate(budget=1)", SPECS["softmax"], "batch")
    generator = torch.Generator().manual_seed(0)
    inner_ERH, outer_EXH = (torch.randn(E, 3 + more, H, generator=generator) for more in (0, 1))
    layer.resident = Resident({"surrogate_in": inner_ERH, "surrogate_out": outer_EXH}, 0, 1, layer.device)
    asked: list[int] = []

    def watched(hidden_NH: Tensor, *given: Tensor) -> Tensor:
        asked.append(len(hidden_NH))
        return by_pairs(hidden_NH, *given)

    layer.resident.sum = watched
    hidden_NH, logits_NE = torch.randn(9, H, generator=generator), torch.randn(9, E, generator=generator)
    native = layer.spec.native(logits_NE)
    rows.fill(Requests(np.array([1, 4, 1, 1]), np.array([False, True, False, False]), [None] * 4), 9)  # two of padding
    routed(layer, hidden_NH, logits_NE, native)
    assert layer.left is not None
    ids_NK, weights_NK = layer.left
    added_NH = supplement(layer, hidden_NH)
    assert asked == [3]
    assert layer.left is None
    assert added_NH is not None
    torch.testing.assert_close(added_NH, layer.resident.whole()(hidden_NH, ids_NK, weights_NK), rtol=1e-4, atol=1e-4)
    assert added_NH[[0, 5, 6]].any()  # some of what they want the prompt reads anyway
    assert not added_NH[1:5].any()
    assert supplement(layer, hidden_NH) is None  # once
    rows.fill(Requests(np.ones(9, np.int64), np.zeros(9, bool), [None] * 9), 9)
    routed(layer, hidden_NH, logits_NE, native)
    assert supplement(layer, hidden_NH) is not None
    assert asked == [3, 9]
