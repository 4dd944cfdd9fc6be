"""The vLLM host with routing in two launches, interpreted: chosen where it can run, the same for what comes after."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_vllm_compiled import MAX_REQUESTS, SPECS, E, H, K, a_layer, fill

from carpool import Routing, parse
from carpool.hosts.engine import fused
from carpool.hosts.engine.fused import Kernels, obstacle, path
from carpool.hosts.engine.knobs import Knobs
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.log import log
from carpool.hosts.engine.step_rows import Rows
from carpool.hosts.vllm.router import routed
from carpool.kernels.launch import Fused
from carpool.plans.counters import FIELDS


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPUs pass for devices that run kernels."""
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))


def ready(text: str, spec: str, group: str, graphs: bool = False) -> tuple[Layer, Rows, Kernels]:
    layer, rows = a_layer(text, SPECS[spec], group)
    assert layer.step is not None
    layer.step.graphs = graphs
    kernels = Kernels(rows)
    kernels.use([layer], try_new=True)
    assert path(layer) == "two launches"
    return layer, rows, kernels


def call(layer: Layer, count: int, seed: int = 1) -> tuple[Routing, Any, dict[str, float]]:
    """Routing, what is left to surrogates, and counters of one call."""
    assert layer.step is not None
    generator = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(count, E, generator=generator)
    hidden_NH = torch.randn(count, H, generator=generator)
    native = layer.spec.native(logits_NE)
    layer.step.counters.reset()
    routing = routed(layer, hidden_NH, logits_NE, native)
    left, layer.left = layer.left, None
    totals = layer.step.counters.of_layer(0).tolist()
    return routing, left, dict(zip(FIELDS, totals, strict=True))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("text", "group", "spec", "graphs"),
    [
        ("xshare(budget=8)", "batch", "softmax", False),
        ("xshare(budget=8) | floor(0.3)", "request", "grouped", True),
        ("surrogate(budget=8)", "batch", "softmax", True),
        pytest.param("surrogate(budget=8)", "request", "softmax", False, marks=SLOW),
        pytest.param("oea(k0=2) | floor(0.3)", "request", "grouped", False, marks=SLOW),
        pytest.param("sere(top=1, threshold=0.4)", "tenant", "softmax", False, marks=SLOW),
        pytest.param("sere(top=1, threshold=0.4)", "batch", "softmax", True, marks=SLOW),
        pytest.param("topk(k=2)", "batch", "grouped", True, marks=SLOW),
    ],
)
def test_two_launches_route_and_count_like_operations(text: str, group: str, spec: str, graphs: bool) -> None:
    layer, rows, _ = ready(text, spec, group, graphs)
    launches = layer.fused
    changed = 0
    for count in (1, 9, 17):
        fill(rows, count)
        layer.fused = launches
        ours, ours_left, ours_counted = call(layer, count)
        layer.fused = None
        theirs, theirs_left, theirs_counted = call(layer, count)
        assert torch.equal(ours.ids_NK, theirs.ids_NK)
        torch.testing.assert_close(ours.weights_NK, theirs.weights_NK, rtol=1e-5, atol=0)
        assert ours_counted == pytest.approx(theirs_counted, abs=1e-5)
        assert (ours_left is None) == (theirs_left is None)
        if ours_left is not None:
            torch.testing.assert_close(ours_left[1], theirs_left[1], rtol=1e-5, atol=0)
        changed += ours_counted["rows_changed"]
    assert changed > 0


def test_other_numbers_keep_the_launches_and_another_kind_waits() -> None:
    """What recorded graphs hold is not replaced; a new kind is compiled when the user says so."""
    layer, rows, kernels = ready("xshare(budget=8)", "softmax", "batch")
    launches = layer.fused
    assert layer.knobs is not None
    fill(rows, 17)
    _, _, narrower = call(layer, 17)
    wider = parse("xshare(budget=16)").for_serving()
    layer.knobs.set(wider)
    layer.plan = wider
    kernels.use([layer], try_new=False)
    assert layer.fused is launches
    _, _, counted = call(layer, 17)
    assert counted["coreset"] > narrower["coreset"]
    other = parse("oea(k0=1)").for_serving()
    layer.plan, layer.knobs = other, Knobs(other, E, layer.device)
    kernels.use([layer], try_new=False)
    assert path(layer) == "operation by operation"
    kernels.use([layer], try_new=True)
    assert path(layer) == "two launches"


def test_more_rows_than_the_buffers_hold() -> None:
    layer, rows, _ = ready("xshare(budget=8)", "softmax", "batch")
    fill(rows, 17)
    layer.fused.scratch.max_rows = 16
    _, _, counted = call(layer, 17)
    assert counted["rows_changed"] > 0


def test_launches_that_decide_otherwise_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, rows = a_layer("xshare(budget=8)", SPECS["softmax"], "batch")

    def wrong(self: Fused, logits_NE: torch.Tensor, native: Routing, *_: Any, **__: Any) -> Routing:
        return native

    monkeypatch.setattr(Fused, "__call__", wrong)
    with caplog.at_level(logging.WARNING, logger=log().name):
        Kernels(rows).use([layer], try_new=True)
    assert path(layer) == "operation by operation"
    assert "choose other experts" in caplog.text


def test_a_rank_that_cannot_keeps_all_from_it() -> None:
    layer, rows = a_layer("xshare(budget=8)", SPECS["softmax"], "batch")
    Kernels(rows, agree=lambda _: False).use([layer], try_new=True)
    assert path(layer) == "operation by operation"


def test_what_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, cuda = parse("xshare(budget=8)"), torch.device("cuda")
    assert obstacle(cuda, plan, E, K) is None
    assert "more than two launches" in (obstacle(cuda, parse("xshare_speculative(8, 4)"), E, K) or "")
    monkeypatch.setattr(fused, "DEVICES", ("cuda",))
    assert "not on cpu" in (obstacle(torch.device("cpu"), plan, E, K) or "")
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert obstacle(cuda, plan, E, K) == "Triton is not installed"


def test_the_buffers_are_counted() -> None:
    """The memory that vLLM leaves to keys and values is what these do not take."""
    _, rows, kernels = ready("xshare(budget=8)", "softmax", "request")
    sums, scores = MAX_REQUESTS * E * (8 + 4), 2 * rows.size * E * 4
    assert sums + scores <= kernels.memory <= sums + scores + 4096
