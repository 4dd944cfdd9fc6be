"""Find the MoE layers of a model, and name the model by its routers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from carpool.artefacts.identity import Held, Identity, Sample, sample
from carpool.artefacts.identity import fingerprint as of_routers
from carpool.errors import CarpoolError
from carpool.hosts.transformers.expert_parallel import device_of, whole
from carpool.hosts.transformers.families import Rule, rule_of
from carpool.hosts.transformers.offload import weight
from carpool.hosts.transformers.planes import PlanesExperts
from carpool.hosts.transformers.refused import refuse
from carpool.routing.spec import RouteSpec, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        name: path of the block in the model, such as `model.layers.3.mlp`.
        index: the layer's number in that path.
        block, router, experts: the modules.
        rule, spec: how it routes. num_experts, top_k: `E` and `K`.
    """

    name: str
    index: int
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    experts: nn.Module = field(repr=False)
    rule: Rule = field(repr=False)
    spec: RouteSpec = field(repr=False)
    num_experts: int
    top_k: int

    @property
    def weight_EH(self) -> Tensor:
        """The router's weight matrix, on the device where the layer computes."""
        for name, parameter in self.router.named_parameters():
            if parameter.ndim == 2 and parameter.shape[0] == self.num_experts:
                held = weight(self.router, name)
                assert held is not None
                return whole(held)
        raise CarpoolError(f"{self.name}: {type(self.router).__name__} has no weight of {self.num_experts} experts")

    @property
    def device_E(self) -> Tensor | None:
        """The rank that holds each expert; None where they are all in this process."""
        return device_of(self.experts, self.num_experts)

    def sample(self) -> Sample:
        """Of the experts' weights, in the order that all hosts take it in."""
        if self.planes is not None:
            return self.planes.sample
        into, out = (weight(self.experts, name) for name in ("gate_up_proj", "down_proj"))
        into = weight(self.experts, "up_proj") if into is None else into
        if out is None or out.dim() != 3:
            return Sample(hidden=f"{type(self.experts).__name__} without a plain down_proj")
        if type(out) not in (nn.Parameter, Tensor):  # sharded over ranks, or quantised behind a tensor's back
            return Sample(hidden=f"weights of the class {type(out).__name__}")
        if getattr(self.experts, "is_transposed", False):
            into, out = into if into is None else into.mT, out.mT
        width = out.shape[2]
        if into is None or into.dim() != 3 or into.shape[1] not in (width, 2 * width):
            return Sample(hidden=f"{type(self.experts).__name__} with packed weights of {out.dtype}")
        return sample(self.index, Held(into, out, width))

    @property
    def planes(self) -> PlanesExperts | None:
        """Its experts, where they are planes."""
        return self.experts if isinstance(self.experts, PlanesExperts) else None

    @property
    def expert_numbers(self) -> float:
        """Weights and biases of one expert."""
        held = sum(one.numel() for one in self.experts.parameters()) / self.num_experts
        return held if self.planes is None else held + self.planes.numbers

    def unpack(self, output: object) -> tuple[int, int, int]:
        """Places of logits, weights and ids in the router's output; families differ in their order.

        Raises:
            CarpoolError: the output has no such three tensors.
        """
        slots = dict(enumerate(output)) if isinstance(output, tuple) else {}
        tensors = {slot: value for slot, value in slots.items() if isinstance(value, Tensor)}
        ids = [s for s, v in tensors.items() if not v.is_floating_point() and v.shape[-1:] == (self.top_k,)]
        floats = {s: v for s, v in tensors.items() if v.is_floating_point()}
        if len(ids) == 1:
            shape = tensors[ids[0]].shape
            weights = [s for s, v in floats.items() if v.shape == shape]
            # with K = E the logits have the weights' shape: in every known order the weights are in the middle
            weights = weights if len(weights) == 1 else [s for s in weights if s == 1]
            logits = [s for s, v in floats.items() if v.shape[-1] == self.num_experts and s not in weights]
            if len(weights) == 1 and len(logits) == 1:
                return logits[0], weights[0], ids[0]
        raise CarpoolError(
            f"{self.name}: {type(self.router).__name__} does not return logits, weights and ids as tensors; "
            "a replaced router cannot be shared"
        )

    def route(self, hidden_NH: Tensor) -> tuple[Tensor, Routing]:
        """Logits `[N, E]` and native routing of rows, by the router alone."""
        given = [weight(self.block, name) for name in self.rule.arguments]
        hidden = hidden_NH.unsqueeze(0) if self.rule.unflattened else hidden_NH
        held = dict(self.router.named_parameters())
        state = {name: found for name, one in held.items() if (found := whole(one)) is not one}
        return self.routed(torch.func.functional_call(self.router, state, (hidden, *given)))

    def routed(self, output: tuple) -> tuple[Tensor, Routing]:
        """Logits `[N, E]` and native routing in the router's output."""
        logits, weights, ids = self.unpack(output)
        native = Routing(output[ids].reshape(-1, self.top_k), output[weights].reshape(-1, self.top_k))
        return output[logits].reshape(-1, self.num_experts), native


def find_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a transformers model in the order of its modules.

    Raises:
        CarpoolError: no MoE layer, a family that is refused, a router of an unknown class, or two layers of one number.
    """
    refuse(model)
    found = [_layer(name, block, router) for name, block in model.named_modules() if (router := _router(block))]
    layers = [layer for layer in found if layer.rule.only in ("", layer.name.rsplit(".", 1)[-1])]
    # a model that is one part alone does not name the part
    layers = [layer for layer in layers if layer.rule.part in ("", *layer.name.split("."))] or layers
    if not layers:
        raise CarpoolError(
            f"{type(model).__name__} has no mixture-of-experts layer: it is a dense model, or its experts have no "
            "router module that Carpool could hook (docs/families.md lists the families it knows)"
        )
    by_index: dict[int, MoELayer] = {}
    for layer in layers:
        if by_index.setdefault(layer.index, layer) is not layer:
            raise CarpoolError(
                f"{by_index[layer.index].name} and {layer.name} have the same layer number; "
                "share one part of the model at a time, such as model.thinker"
            )
    return layers


def models_around(model: nn.Module, layers: list[MoELayer]) -> list[nn.Module]:
    """The models that hold all layers, from the outermost to the innermost: the whole one, `generate`'s, the inner one.
    Wrappers that are no models of transformers are left out."""
    from transformers import PreTrainedModel

    names = zip(*(layer.name.split(".") for layer in layers), strict=False)
    way = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, names)]
    modules = accumulate(way, lambda module, name: module.get_submodule(name), initial=model)
    return [module for module in modules if isinstance(module, PreTrainedModel)] or [model]


def entrances(model: nn.Module, layers: list[MoELayer]) -> list[nn.Module]:
    """The modules whose forwards lead to the layers: the models around them, or the one part that alone is shared."""
    names, part = layers[0].name.split("."), layers[0].rule.part
    if part in names:
        return [model.get_submodule(".".join(names[: names.index(part) + 1]))]
    return models_around(model, layers)


def fingerprint(model: nn.Module) -> str:
    """The model's name in artefacts made from it (see `carpool.artefacts.identity.fingerprint`)."""
    return of_routers((layer.index, layer.weight_EH) for layer in find_layers(model))


def identity(layers: list[MoELayer]) -> Identity:
    """What files made for a model are checked against."""
    samples = {layer.index: layer.sample() for layer in layers}
    first = layers[0]
    return Identity(
        fingerprint=of_routers((layer.index, layer.weight_EH) for layer in layers),
        layers=tuple(layer.index for layer in layers),
        num_experts=first.num_experts,
        top_k=first.top_k,
        hidden_size=samples[first.index].hidden_size,
        samples=samples,
    )


def weight_bytes(model: PreTrainedModel) -> tuple[float, float]:
    """Bytes of one expert of one layer (the mean over layers), and of all that a decoding step reads beside experts:
    every other weight but the input embeddings, of which a step reads a row a token."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(one.numel() * one.element_size() for one in parameters)

    layers = find_layers(model)
    routed = {id(parameter) for layer in layers for parameter in layer.experts.parameters()}
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    beside = [one for one in model.parameters() if id(one) not in routed and (one is not embeddings or one is head)]
    each = [size(layer.experts.parameters()) / layer.num_experts for layer in layers]
    each = [size + (layer.planes.expert_bytes if layer.planes else 0) for size, layer in zip(each, layers, strict=True)]
    return sum(each) / len(each), float(size(beside))


def _router(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    if "experts" not in children:
        return None
    return next((children[name] for name in ROUTER_NAMES if name in children), None)


def _layer(name: str, block: nn.Module, router: nn.Module) -> MoELayer:
    rule = rule_of(router, name)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if number is None:
        raise CarpoolError(f"{name} has no layer number in its name; Carpool keeps statistics by layer number")
    spec = rule.spec(router, block)
    num_experts = rule.experts(router)
    spec.check(num_experts)
    experts = block.get_submodule("experts")
    return MoELayer(name, int(number[1]), block, router, experts, rule, spec, num_experts, spec.top_k)
