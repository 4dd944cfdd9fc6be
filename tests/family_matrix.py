"""What holds for a family in the transformers host, measured on a tiny model of it: one row of the matrix."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import FAMILIES, MORE, VARIANTS, tiny_model, tokens

import carpool
from carpool.hosts.transformers import MoELayer, attach
from carpool.routing.conformance import compare
from carpool.routing.spec import RouteSpec, Routing

NAMES = sorted([*FAMILIES, *MORE, *VARIANTS])
BUDGET = 3
WORDS = {"softmax_after_topk": "softmax of the selected", "probabilities": "softmax (hands over probabilities)"}


def measure(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The row of a family, or of a variant of it, on a model with random weights of one dtype.

    Raises:
        CarpoolError: the host refuses the model; above all where a router does not conform to its rule.
    """
    family, changes = VARIANTS.get(name, (name, {}))
    model = tiny_model(family, dtype=dtype, **changes)
    stock = forward(model)
    layers = attach(model).layers  # compares every router with its rule, on random hidden states
    off, routed = forward(model), _watch_routers(model, layers)
    identical = []
    for plan in (f"xshare(budget={layers[0].num_experts})", f"topk(k={layers[0].top_k})"):
        with carpool.share(model, plan, exempt_prefill=False) as run:
            identical.append(torch.equal(forward(model), stock) and run.changed_rows() == 0)
    error, bitwise = _recompute(layers, routed)
    changed, allowed, sums = _restrict(model, layers)
    spec = layers[0].spec
    return {
        "name": name,
        "family": layers[0].rule.family,
        "model": type(model).__name__,
        "router": type(layers[0].router).__name__,
        "note": layers[0].rule.note,
        "dtype": str(dtype).removeprefix("torch."),
        "rule": describe(spec),
        "conforms": True,
        "recomputed": "exact" if bitwise else "rounded",
        "recomputed_error": error,
        "off_identical": torch.equal(off, stock),
        "identity_identical": all(identical),
        "rows": len(layers) * tokens().numel(),
        "changed_rows": changed,
        "only_allowed": allowed,
        "weights_add_up": sums,
        "stock_afterwards": torch.equal(forward(model), stock),
    }


def describe(spec: RouteSpec) -> str:
    """A rule in words."""
    parts = [WORDS.get(spec.scoring, spec.scoring)]
    parts += ["correction bias"] if spec.bias_E is not None else []
    parts += [f"{spec.kept_groups} of {spec.num_groups} groups"] if spec.num_groups > 1 else []
    parts += ["renormalised"] if spec.renormalize and spec.scoring != "softmax_after_topk" else []
    parts += [f"× {spec.scaling:g}"] if spec.scaling != 1 else []
    parts += ["× a factor per expert"] if spec.per_expert_scale_E is not None else []
    return ", ".join(parts)


@torch.no_grad()
def forward(model: Any) -> torch.Tensor:
    """Logits, or hidden states of a model without a head."""
    if hasattr(model, "codec_embedding"):  # a talker that is fed embeddings
        return model(inputs_embeds=model.codec_embedding(tokens()))[0]
    if hasattr(model.config, "canvas_length"):  # a decoder that denoises a canvas after a prompt
        return model(input_ids=tokens(seed=2), decoder_input_ids=tokens())[0]
    return model(input_ids=tokens())[0]


def _watch_routers(model: Any, layers: list[MoELayer]) -> list[tuple[torch.Tensor, Routing]]:
    """Logits and routing of every layer in a stock forward."""
    seen: list[tuple[torch.Tensor, Routing]] = []
    hooks = [
        layer.router.register_forward_hook(lambda module, args, output, layer=layer: seen.append(layer.routed(output)))
        for layer in layers
    ]
    forward(model)
    for hook in hooks:
        hook.remove()
    return seen


def _recompute(layers: list[MoELayer], routed: list[tuple[torch.Tensor, Routing]]) -> tuple[float, bool]:
    """How far the rule's weights are from the router's, over a row's largest; and whether not a bit is other."""
    errors, bitwise = [], True
    for layer, (logits_NE, native) in zip(layers, routed, strict=True):
        compare(layer.spec, logits_NE, native, layer.name)
        ids_NK, weights_NK = native.ids_NK.long(), native.weights_NK
        ours_NK = layer.spec.mix(layer.spec.scores(logits_NE)[1], ids_NK, torch.ones_like(ids_NK, dtype=torch.bool))
        bitwise &= torch.equal(ours_NK.to(weights_NK.dtype), weights_NK)
        off_NK = (ours_NK.to(weights_NK.dtype).double() - weights_NK.double()).abs()
        errors.append(float((off_NK / weights_NK.double().amax(-1, keepdim=True)).max()))
    return float(f"{max(errors):.1e}"), bitwise


def _restrict(model: Any, layers: list[MoELayer]) -> tuple[int, bool, bool]:
    """Rows that a small budget changes; whether experts receive only what it allows; and in the model's convention."""
    received: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    outcomes: dict[int, Any] = {}

    def spy(place: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            _, ids_NK, weights_NK = (*args, *kwargs.values())
            received[place] = (ids_NK, weights_NK)

        return hook

    hooks = [
        layer.experts.register_forward_pre_hook(spy(place), with_kwargs=True) for place, layer in enumerate(layers)
    ]
    plan = f"xshare(budget={BUDGET}, warmup=0)"

    def observe(place: int, batch: Any, outcome: Any) -> None:
        outcomes[place] = outcome

    with carpool.share(model, plan, exempt_prefill=False, observe=observe) as run:
        finite = bool(forward(model).isfinite().all())
    for hook in hooks:
        hook.remove()
    allowed, sums = finite, True
    for place, layer in enumerate(layers):
        (ids_NK, weights_NK), outcome, spec = received[place], outcomes[place], layer.spec
        coreset_E = outcome.coreset_GE[0]
        allowed &= int(coreset_E.sum()) == BUDGET and bool(coreset_E[ids_NK.long()].all())
        allowed &= run.report()[place].rows_changed == int(outcome.changed_N.sum())
        total_N = weights_NK.double().sum(-1)
        if spec.per_expert_scale_E is not None:
            sums &= bool(total_N.isfinite().all())
        elif spec.renormalize or spec.scoring == "softmax_after_topk":
            sums &= bool(((total_N - spec.scaling).abs() < 1e-2 * spec.scaling).all())
        else:
            sums &= bool((total_N < spec.scaling).all())
    return run.changed_rows(), allowed, sums
