"""Routing as one compiled graph: the two hundred small operations of a layer's routing become a handful of loops.

One graph serves all layers that route by the same rule under the same kind of plan, whatever the number of rows; the
numbers of a plan are inputs. What a compiler may round differently (a sum, an exponential) reaches weights of changed
rows only: scores are computed outside, and coresets come from whole numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from carpool.experts.surrogates import pair_factors, pair_sum
from carpool.hosts.engine.ahead import compile_ahead
from carpool.hosts.engine.layer import Graph, Layer
from carpool.hosts.engine.log import log
from carpool.hosts.engine.resident import Resident
from carpool.hosts.engine.step_rows import Rows
from carpool.plans.counters import measured
from carpool.plans.pipeline import decide, scored
from carpool.routing.batch import Batch
from carpool.routing.spec import RouteSpec, Routing

ROWS, REQUESTS = 11, 5  # of the example: sizes that nothing else has, or the compiler takes them for the same
BACKEND: str | None = None  # of torch.compile; None: ahead of time on CPUs, inductor elsewhere
IDS_IN_RANGE = {"assert_indirect_indexing": False}  # they are our own


class Compiler:
    """Compiled graphs by what they depend on; None for one that failed.

    Args:
        group: rows that share a coreset; may be set anew.
        agree: whether a condition holds on all ranks that must decide alike.
    """

    def __init__(self, group: str, agree: Callable[[bool], bool] = bool) -> None:
        self.group, self._agree = group, agree
        self._graphs: dict[str, Graph | None] = {}

    def use(self, layers: list[Layer], compile_new: bool) -> None:
        """Give every layer the graph of its plan.

        Args:
            layers: with their plans.
            compile_new: compile what was not compiled before; otherwise such plans run operation by operation.
        """
        keys = [f"{self.group == 'batch'}:{_key(layer)}" for layer in layers]
        if compile_new:
            for key, layer in zip(keys, layers, strict=True):
                if key not in self._graphs:
                    self._graphs[key] = self._try(partial(_compile, layer, self.group))
            if not self._agree(all(self._graphs[key] is not None for key in keys)):
                self._graphs |= dict.fromkeys(keys)
        for key, layer in zip(keys, layers, strict=True):
            layer.graph = self._graphs.get(key)
            self._use_sum(layer, compile_new)

    def _use_sum(self, layer: Layer, compile_new: bool) -> None:
        """The graph of a layer's surrogates, if its plan uses some; ranks need not agree, the sum decides nothing."""
        resident = layer.resident if layer.plan.policy.surrogates else None
        if resident is None:
            return
        key = repr(([_shape(tensor) for tensor in resident.tensors], layer.spec.top_k, str(layer.device)))
        if compile_new and key not in self._graphs:
            self._graphs[key] = self._try(partial(_compile_sum, resident, layer.spec.top_k))
        resident.sum = self._graphs.get(key)

    @staticmethod
    def _try(make: Callable[[], Graph]) -> Graph | None:
        said, start = log(), time.monotonic()
        try:
            graph = make()
        except Exception as error:  # a compiler may fail in any way, and routing works without it
            cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            said.warning("carpool routes without a compiled graph, which costs speed: %s", cause)
            return None
        said.info("carpool compiled its routing in %.0f s", time.monotonic() - start)
        return graph


def run(graph: Graph, layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing,
        rows: Rows) -> tuple[Routing, Tensor] | None:  # fmt: skip
    """Routing and counters of one call; None for inputs that the graph was not compiled for."""
    if native.ids_NK.dtype != torch.int32 or native.weights_NK.dtype != torch.float32:
        return None
    count = len(logits_NE)
    if count == 1:  # compilers take one row for a special case; a second one is padding
        if rows.size == 1:
            return None
        hidden_NH, logits_NE = hidden_NH.expand(2, -1), logits_NE.expand(2, -1)
        native = Routing(native.ids_NK.expand(2, -1), native.weights_NK.expand(2, -1))
    *routing, values_F = graph(*_arguments(layer, hidden_NH, logits_NE, native, rows))
    if count == 1:
        routing = [None if tensor is None else tensor[:1] for tensor in routing]
    return Routing(*routing), values_F


def _arguments(
    layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing, rows: Rows
) -> tuple[Tensor | None, ...]:
    assert layer.knobs is not None
    scores_NE, weights_NE = scored(layer.spec, logits_NE)
    return (
        logits_NE.float().contiguous(),
        scores_NE.float().contiguous(),
        weights_NE.contiguous(),
        native.ids_NK.contiguous(),
        native.weights_NK.contiguous(),
        hidden_NH.float().contiguous() if layer.plan.policy.needs_hidden else None,
        *rows.tensors(len(logits_NE)),
        layer.spec.per_expert_scale_E,
        *layer.knobs.tensors,
        *layer.stats.values(),
    )


def _compile(layer: Layer, group: str) -> Graph:
    knobs = layer.knobs
    assert knobs is not None
    plan, spec = layer.plan, replace(layer.spec, bias_E=None)  # the scores have it
    count, names, deepest = len(knobs.tensors), [*layer.stats], layer.deepest

    def routed(
        logits_NE: Tensor, scores_NE: Tensor, weights_NE: Tensor, ids_NK: Tensor, native_NK: Tensor,
        hidden_NH: Tensor | None, group_N: Tensor, real_N: Tensor, voter_N: Tensor, exempt_N: Tensor, step_N: Tensor,
        request_N: Tensor, slots_R: Tensor, scale_E: Tensor | None, *rest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        num_requests = slots_R.shape[0]
        batch = Batch(
            group_N, 1 if group == "batch" else num_requests, real_N, voter_N, exempt_N, step_N,
            request_N=request_N, num_requests=num_requests,
        )  # fmt: skip
        skipped_NK = ids_NK < 0
        native = Routing(ids_NK.masked_fill(skipped_NK, 0), native_NK)
        stats = dict(zip(names, rest[count:], strict=True))
        outcome = decide(
            knobs.over(plan, rest[:count]), replace(spec, per_expert_scale_E=scale_E), logits_NE, scores_NE,
            weights_NE, batch, native=native, stats=stats, hidden_NH=hidden_NH,
        )  # fmt: skip
        return (
            torch.where(skipped_NK, ids_NK, outcome.routing.ids_NK),
            outcome.routing.weights_NK,
            outcome.routing.surrogate_ids_NK,
            outcome.routing.surrogate_weights_NK,
            outcome.routing.depth_NK,
            measured(batch, outcome, deepest),
        )

    given = _example(layer, group)
    eager = routed(*given)
    graph, compiled = _compile_for_any_rows(routed, given, 13)  # all that has a row or request dimension
    if not torch.equal(compiled[0], eager[0]) or not torch.allclose(compiled[1], eager[1], atol=1e-6):
        raise RuntimeError("the compiled graph routes differently from the same operations one by one")
    return graph


def _compile_sum(resident: Resident, top_k: int) -> Graph:
    """The sum of surrogates, which runs on the experts' input, as two graphs: in one, the compiler makes the factors
    of the second step anew for every number."""
    E, _, H = resident.tensors[0].shape
    generator = torch.Generator().manual_seed(0)
    device = resident.tensors[0].device
    hidden_NH = torch.randn(ROWS, H, generator=generator).to(device)
    weights_NK = torch.rand(ROWS, top_k, generator=generator).to(device)
    ids_NK = torch.randint(0, E, (ROWS, top_k), generator=generator, dtype=torch.int32).to(device)
    inner_ERH, outer_EXH, *scales = (*resident.tensors, None, None)[:4]
    given = (hidden_NH, ids_NK, weights_NK)
    # megabytes of maps: unlike routing, enough work for all threads
    options = IDS_IN_RANGE | {"cpp.threads": torch.get_num_threads(), "cpp.dynamic_threads": True}
    first, factors = _compile_for_any_rows(pair_factors, (*given, inner_ERH, *scales), 3, options)
    second, [compiled_NH] = _compile_for_any_rows(_pair_sum, (*factors, outer_EXH), 2, options)
    eager_NH = resident.whole()(*given)
    if not torch.allclose(compiled_NH, eager_NH, rtol=1e-3, atol=1e-4 * float(eager_NH.abs().max())):
        raise RuntimeError("the compiled sum of surrogates differs from the same operations one by one")

    def summed(hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, inner_ERH: Tensor, outer_EXH: Tensor,
               inner_scale_ER: Tensor | None = None, outer_scale_EX: Tensor | None = None) -> Tensor:  # fmt: skip
        factors = first(hidden_NH, ids_NK, weights_NK, inner_ERH, inner_scale_ER, outer_scale_EX)
        [summed_NH] = second(*factors, outer_EXH)
        return cast("Tensor", summed_NH)

    return summed


def _pair_sum(*given: Tensor) -> tuple[Tensor]:
    return (pair_sum(*given),)


def _compile_for_any_rows(
    function: Graph, given: tuple[Tensor | None, ...], with_rows: int, options: dict[str, Any] | None = None
) -> tuple[Graph, tuple[Any, ...]]:
    """A graph and what it makes of an example, whose first arguments have a dimension of rows or requests.

    Args:
        options: of inductor.
    """
    if BACKEND is None and all(value is None or value.device.type == "cpu" for value in given):
        graph = compile_ahead(function, given, with_rows, options or {})
        return graph, graph(*given)
    # we choose the graph ourselves: nothing to check at every call, and no graph for every number of rows
    options = {"guard_filter_fn": lambda guards: [False for _ in guards]} | ((options or {}) if BACKEND is None else {})
    how: dict[str, Any] = {"backend": BACKEND or "inductor", "options": options, "isolate_recompiles": True}
    graph = torch.compile(function, **how, fullgraph=True)
    for value in given[:with_rows]:
        if value is not None:
            torch._dynamo.mark_dynamic(value, 0)
    return graph, graph(*given)


def _example(layer: Layer, group: str) -> tuple[Any, ...]:
    """Made-up rows, some of them exempt, as a call has them."""
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(ROWS, layer.num_experts, generator=generator).to(layer.device)
    hidden_NH = torch.randn(ROWS, layer.hidden_size, generator=generator).to(layer.device)
    rows = Rows(ROWS, REQUESTS, group, layer.device)
    rows.example()
    native = layer.spec.native(logits_NE)
    native = Routing(native.ids_NK, native.weights_NK.float())
    return _arguments(layer, hidden_NH, logits_NE, native, rows)


def _key(layer: Layer) -> str:
    """What a graph is compiled for."""
    assert layer.knobs is not None
    spec = {field.name: _shape(getattr(layer.spec, field.name)) for field in fields(RouteSpec)}
    stats = {name: _shape(tensor) for name, tensor in layer.stats.items()}
    return repr((layer.knobs.kind, layer.num_experts, layer.hidden_size, spec, stats, str(layer.device)))


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
