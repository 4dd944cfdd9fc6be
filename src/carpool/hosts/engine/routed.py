"""One call of a router under its layer's plan, by the fastest form that the plan has there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.engine import compiled, fused
from carpool.hosts.engine.layer import Layer
from carpool.plans.counters import measured
from carpool.plans.pipeline import Outcome, route
from carpool.routing.spec import ALL_BITS, Routing


def routed(layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing) -> Routing:
    """The routing of one call; the native one outside of a forward pass with rows to share. The layer's buffer, if it
    has one, says how deep its experts are read.

    Raises:
        CarpoolError: the router sees other rows than the engine's batch has, or what was left to surrogates by
            the call before was never added.
    """
    routing = _routing(layer, hidden_NH, logits_NE, native)
    if layer.depth_NK is not None:
        mine_NK = layer.depth_NK[: len(logits_NE)]
        mine_NK.fill_(ALL_BITS) if routing.depth_NK is None else mine_NK.copy_(routing.depth_NK)
    return routing


def _routing(layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing) -> Routing:
    layer.require_added()
    step = layer.step
    assert step is not None
    rows = step.rows
    expected = rows.expected or step.forward_rows()
    if expected and len(logits_NE) != expected:
        raise CarpoolError(
            f"{layer.name}: the router sees {len(logits_NE)} rows of a forward pass of {expected} "
            "(sequence parallelism, micro-batches or gathered rows); this set-up is not supported"
        )
    if not (step.graphs or (step.enabled and rows.sharing >= layer.plan.least_voters)):
        return native
    if layer.fused is not None and step.observer is None:
        counted = fused.run(layer, hidden_NH, logits_NE, native, rows)
        if counted is not None:
            return _leaving(layer, counted)
    if layer.graph is not None and step.observer is None:
        done = compiled.run(layer.graph, layer, hidden_NH, logits_NE, native, rows)
        if done is not None:
            return _leaving(layer, _counted(layer, *done))
    batch = rows.batch(len(logits_NE))
    skipped_NK = native.ids_NK < 0  # some GPU kernels mark padding so; the experts module knows it
    valid = Routing(native.ids_NK.masked_fill(skipped_NK, 0), native.weights_NK)
    plan = layer.knobs.plan if step.graphs and layer.knobs is not None else layer.plan
    outcome = route(plan, layer.spec, logits_NE, batch, native=valid, stats=layer.stats, hidden_NH=hidden_NH)
    if step.observer is not None:
        step.observer(layer, logits_NE, outcome)
    return _leaving(
        layer, _counted(layer, _contiguous(outcome, native, skipped_NK), measured(batch, outcome, layer.deepest))
    )


def _counted(layer: Layer, routing: Routing, values_F: Tensor) -> Routing:
    """The routing, counted. A recorded graph also runs where no row shares (warm-up, prompts, switched off), which
    does not count, and with rows of padding, which follow the first row so that they read no expert of their own.
    """
    step = layer.step
    assert step is not None
    if step.graphs:
        _, real_N, voter_N, *_ = step.rows.tensors(len(routing.ids_NK))
        shares = voter_N.any()
        values_F = values_F * shares
        follows_NK = (shares & ~real_N).unsqueeze(-1) & (routing.ids_NK >= 0)
        routing = replace(routing, ids_NK=torch.where(follows_NK, routing.ids_NK[:1], routing.ids_NK))
    step.counters.add_measured(layer.position, values_F)
    return routing


def _leaving(layer: Layer, routing: Routing) -> Routing:
    """The routing, with what it leaves to surrogates kept for the experts."""
    if routing.surrogate_ids_NK is not None and routing.surrogate_weights_NK is not None:
        layer.left = routing.surrogate_ids_NK, routing.surrogate_weights_NK
    return routing


def _contiguous(outcome: Outcome, native: Routing, skipped_NK: Tensor) -> Routing:
    """The CPU kernel ignores strides."""
    ids_NK = torch.where(skipped_NK, native.ids_NK, outcome.routing.ids_NK)
    return replace(outcome.routing, ids_NK=ids_NK.contiguous(), weights_NK=outcome.routing.weights_NK.contiguous())
