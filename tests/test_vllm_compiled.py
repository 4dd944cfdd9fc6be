"""Compiled routing in the vLLM host: the same experts as operation by operation, for every number of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from carpool import RouteSpec, Routing, parse
from carpool.hosts.engine import ahead, compiled
from carpool.hosts.engine.compiled import Compiler
from carpool.hosts.engine.knobs import Knobs
from carpool.hosts.engine.layer import Layer, Step
from carpool.hosts.engine.log import log
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.hosts.vllm.router import routed
from carpool.plans.counters import Counters, measured
from carpool.plans.pipeline import route

E, K, H, MAX_REQUESTS = 32, 4, 16, 8
SPECS = {
    "softmax": RouteSpec(top_k=K),
    "grouped": RouteSpec(K, "sigmoid", bias_E=torch.arange(E) / 100, num_groups=4, kept_groups=2, group_score="top2"),
}
# plan, another of its kind, grouping, rule
CASES = [
    ("xshare(budget=8)", "xshare(budget=12, warmup=0)", "batch", "softmax"),
    ("oea(k0=2) | floor(1)", "oea(k0=1) | floor(0.3)", "request", "grouped"),
    ("topk(k=2)", "topk(k=1)", "batch", "softmax"),
    ("surrogate(budget=8)", "surrogate(budget=12, warmup=1)", "batch", "softmax"),
]
MORE_CASES = [
    ("xshare_speculative(budget=10, request_budget=4)", "xshare_speculative(budget=8, request_budget=5)", "batch",
     "softmax"),
    ("sere(top=1, threshold=0)", "sere(top=2, threshold=0.4)", "tenant", "softmax"),
    ("des_vote(size=6) | protect([3])", "des_vote(size=9) | protect([3])", "prompt", "grouped"),
    ("random(budget=6)", "random(budget=5, warmup=0)", "request", "softmax"),
]  # fmt: skip


def a_layer(text: str, spec: RouteSpec, group: str) -> tuple[Layer, Rows]:
    rows = Rows(64, MAX_REQUESTS, group, torch.device("cpu"))
    plan = parse(text).for_serving()
    layer = Layer("layers.0", 0, None, spec, plan, E, H, torch.device("cpu"))
    layer.step = Step(rows, Counters(["layers.0"]), graphs=False)
    similarity_EE = torch.rand(E, E, generator=torch.Generator().manual_seed(3))
    layer.statistics = {
        "similarity_frobenius": similarity_EE,
        "surrogate_energy": similarity_EE[0] + 1,
        "surrogate_unexplained": similarity_EE[1],
    }
    layer.stats = plan.policy.prepare(layer.statistics)
    layer.knobs = Knobs(plan, E, layer.device)
    return layer, rows


def fill(rows: Rows, count: int) -> None:
    """Rows of up to three requests' lengths, the last third exempt, one of padding where there are several."""
    rows.clear()
    rows.expected = count
    requests_N = (torch.arange(count) // 3).clamp_max(MAX_REQUESTS - 1)
    rows._request_N[:count] = requests_N
    rows._keyed_N[:count] = requests_N // 2
    rows._real_N[: max(1, count - 1)] = True
    rows._exempt_N[: count - count // 3] = False
    rows._voter_N.copy_(rows._real_N & ~rows._exempt_N)
    rows.sharing = int(rows._voter_N.sum())


def compare(layer: Layer, rows: Rows, count: int, seed: int) -> int:
    """Fails unless graph and operations agree; returns how many rows the plan changed."""
    fill(rows, count)
    logits_NE = torch.randn(count, E, generator=torch.Generator().manual_seed(seed)).bfloat16()
    logits_NE[0] = logits_NE[-1]  # ties
    if count > 4:
        logits_NE[2, 5] = torch.nan
    native = layer.spec.native(logits_NE.float().nan_to_num())
    hidden_NH = torch.zeros(count, H)
    done = compiled.run(layer.graph, layer, hidden_NH, logits_NE, native, rows)
    assert done is not None
    routing, values_F = done
    batch = rows.batch(count)
    outcome = route(layer.plan, layer.spec, logits_NE, batch, native=native, stats=layer.stats, hidden_NH=hidden_NH)
    assert torch.equal(routing.ids_NK, outcome.routing.ids_NK)
    torch.testing.assert_close(routing.weights_NK, outcome.routing.weights_NK)
    assert (routing.surrogate_ids_NK is None) == (outcome.routing.surrogate_ids_NK is None)
    if routing.surrogate_ids_NK is not None:
        assert torch.equal(routing.surrogate_ids_NK, outcome.routing.surrogate_ids_NK)
        torch.testing.assert_close(routing.surrogate_weights_NK, outcome.routing.surrogate_weights_NK)
        assert bool(routing.surrogate_weights_NK.any()) == bool(outcome.changed_N.any())
    unchanged_N = ~outcome.changed_N
    assert torch.equal(routing.weights_NK[unchanged_N], native.weights_NK[unchanged_N])
    assert routing.ids_NK.is_contiguous()
    assert routing.weights_NK.is_contiguous()
    torch.testing.assert_close(values_F, measured(batch, outcome))
    return int(outcome.changed_N.sum())


def check(text: str, other: str, group: str, rule: str) -> None:
    compiler = Compiler(group)
    layer, rows = a_layer(text, SPECS[rule], group)
    compiler.use([layer], compile_new=True)
    graph = layer.graph
    assert graph is not None
    assert sum(compare(layer, rows, count, seed=count) for count in (1, 2, 3, 7, 16, 40)) > 0
    plan = parse(other).for_serving()
    assert layer.knobs is not None
    assert layer.knobs.fits(plan)
    layer.knobs.set(plan)
    layer.plan = plan
    compiler.use([layer], compile_new=False)
    assert layer.graph is graph  # other numbers need no other graph
    graphs = counters["stats"]["unique_graphs"]
    with torch.inference_mode():  # as the engine runs it
        assert sum(compare(layer, rows, count, seed=count) for count in (1, 2, 9, 33)) > 0
    assert counters["stats"]["unique_graphs"] == graphs  # nor do other numbers of rows, or another mode


@pytest.mark.parametrize(("text", "other", "group", "rule"), CASES)
def test_the_graph_chooses_the_same_experts(
    text: str, other: str, group: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    check(text, other, group, rule)


@pytest.mark.parametrize(("text", "other", "group", "rule"), CASES + MORE_CASES)
def test_what_is_compiled_ahead_takes_any_number_of_rows(
    text: str, other: str, group: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncompiled(exported: torch.export.ExportedProgram, _: Any) -> Any:
        return lambda values: exported.module()(*values)

    monkeypatch.setattr(ahead, "_loaded", uncompiled)
    check(text, other, group, rule)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "other", "group", "rule"), CASES + MORE_CASES)
def test_the_compiled_graph_chooses_the_same_experts(text: str, other: str, group: str, rule: str) -> None:
    check(text, other, group, rule)


def test_kinds_do_not_mix_and_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiler = Compiler("batch")
    layers = [
        a_layer(text, SPECS["softmax"], "batch")[0] for text in ("xshare(budget=8)", "xshare(budget=9)", "oea(1)")
    ]
    compiler.use(layers[:2], compile_new=True)
    compiler.use(layers, compile_new=False)
    assert layers[0].graph is layers[1].graph is not None
    assert layers[2].graph is None  # another kind runs operation by operation until it is compiled
    compiler.use(layers, compile_new=True)
    for layer in layers:
        assert layer.step is not None
        assert compare(layer, layer.step.rows, 16, seed=1) > 0


def test_a_failing_compiler_leaves_eager_routing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "no_such_compiler")
    layer, rows = a_layer("xshare(budget=8)", SPECS["softmax"], "batch")
    with caplog.at_level("WARNING", logger=log().name):
        Compiler("batch").use([layer], compile_new=True)
    assert layer.graph is None
    fill(rows, 8)
    logits_NE = torch.randn(8, E)
    routing = routed(layer, torch.zeros(8, H), logits_NE, layer.spec.native(logits_NE))
    assert len(routing.ids_NK[rows._real_N[:8]].unique()) <= 8 + K * 2  # coreset, and what exempt rows read


def test_all_ranks_compile_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    asked: list[bool] = []

    def another_failed(mine: bool) -> bool:
        asked.append(mine)
        return False

    compiler = Compiler("batch", another_failed)
    layer, _ = a_layer("xshare(budget=8)", SPECS["softmax"], "batch")
    compiler.use([layer], compile_new=True)
    assert asked == [True]
    assert layer.graph is None
    compiler.use([layer], compile_new=False)
    assert layer.graph is None


@pytest.mark.parametrize(
    ("text", "sharing", "runs"),
    [("xshare(budget=8)", 1, False), ("xshare(budget=8)", 2, True), ("topk(k=2)", 1, True), ("topk(k=2)", 0, False),
     ("xshare(budget=8) | min_batch(4)", 3, False)],
)  # fmt: skip
def test_a_plan_that_cannot_act_does_not_run(text: str, sharing: int, runs: bool) -> None:
    layer, rows = a_layer(text, SPECS["softmax"], "batch")
    fill(rows, 6)
    rows.sharing = sharing
    logits_NE = torch.randn(6, E)
    native = layer.spec.native(logits_NE)
    assert (routed(layer, torch.zeros(6, H), logits_NE, native) is not native) == runs


def test_what_a_graph_was_not_compiled_for_runs_operation_by_operation() -> None:
    layer, rows = a_layer("xshare(budget=8)", SPECS["softmax"], "batch")
    fill(rows, 8)
    logits_NE = torch.randn(8, E)
    native = layer.spec.native(logits_NE)
    native = Routing(native.ids_NK.long(), native.weights_NK)

    def never(*_: Any) -> Any:
        raise AssertionError

    assert compiled.run(never, layer, torch.zeros(8, H), logits_NE, native, rows) is None


@pytest.mark.parametrize("text", ["xshare(budget=8)", "topk(k=2)"])
@pytest.mark.parametrize("how", [None, "eager"])
def test_recorded_graphs_read_nothing_for_padding(text: str, how: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding follows the first row; a call in which nobody shares is native and not counted."""
    layer, rows = a_layer(text, SPECS["softmax"], "batch")
    if how is not None:
        monkeypatch.setattr(compiled, "BACKEND", how)
        Compiler("batch").use([layer], compile_new=True)
    assert (layer.graph is None) == (how is None)
    assert layer.step is not None
    layer.step.graphs = True
    logits_NE = torch.randn(8, E, generator=torch.Generator().manual_seed(0))
    native = layer.spec.native(logits_NE)
    decoding, prompt = np.zeros(3, bool), np.array([False])

    def ids_of(requests: Requests | None) -> Tensor:
        rows.clear()
        if requests is not None:
            rows.fill(requests, 8)
        return routed(layer, torch.zeros(8, H), logits_NE, native).ids_NK

    ids_NK = ids_of(Requests(np.ones(3, np.int64), decoding, [None] * 3))
    assert torch.equal(ids_NK[3:], ids_NK[:1].expand(5, -1))
    [counted] = layer.step.counters.report()
    assert (counted.steps, counted.rows, counted.union) == (1, 3, len(ids_NK.unique()))
    assert counted.natural_union == len(native.ids_NK[:3].unique())
    for requests in (None, Requests(np.array([5]), ~prompt, [None])):
        assert torch.equal(ids_of(requests), native.ids_NK)
    assert layer.step.counters.report() == [counted]
