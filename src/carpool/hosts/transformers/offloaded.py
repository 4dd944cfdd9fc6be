"""`offload`: a model whose experts are on disk, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carpool.artefacts.files import opened_safetensors
from carpool.artefacts.statistics import Statistics
from carpool.errors import CarpoolError
from carpool.experts.stored import StoredExperts
from carpool.hosts.transformers.as_stored import planes_of
from carpool.hosts.transformers.layers import MoELayer, find_layers
from carpool.hosts.transformers.loading import open_model
from carpool.kernels.experts import build
from carpool.kernels.experts.layout import Experts
from carpool.offloading.amounts import bytes_of
from carpool.offloading.cache import Scope
from carpool.offloading.geometry import Geometry
from carpool.offloading.misses import Misses
from carpool.offloading.residency import Totals
from carpool.offloading.rules import Rule, rule_of
from carpool.offloading.runtime import Offloaded
from carpool.offloading.store import Store, write_store

ENDING = ".offload"
AHEAD_ROWS = 32  # with more, the next layer needs nearly all


class OffloadRun:
    """What happens while a model's experts are on disk.

    Attributes:
        model, tokenizer: the model, and its tokenizer where it was loaded here.
        experts: the runtime; `experts.resident_LE` says how deep each expert is in memory.
    """

    def __init__(self, model: Any, tokenizer: Any, experts: Offloaded) -> None:
        self.model, self.tokenizer, self.experts = model, tokenizer, experts

    @property
    def totals(self) -> Totals:
        """Hits, misses and waiting so far."""
        return self.experts.totals

    def __str__(self) -> str:
        totals, memory = self.totals, self.experts.memory
        waited = totals.waited / totals.computed if totals.computed else 0.0
        used, capacity = memory.used / 1e9, memory.capacity / 1e9
        return (
            f"{totals.uses:,} experts needed, {100 * totals.hit_rate:.1f} % in memory, "
            f"{self.experts.bytes_read / 1e9:.2f} GB read; {totals.waited:.1f} s waited for the disk "
            f"({100 * waited:.0f} % of the experts' time); {used:.2f} of {capacity:.2f} GB held"
        )


@contextmanager
def offload(
    model: str | Path | nn.Module,
    memory: str | int,
    *,
    cache: str | Rule = "sequence_lfu",
    scope: Scope = "layer",
    on_miss: str = "exact",
    prefetch: bool = True,
    deepen: bool = False,
    pinned: Mapping[int, Collection[int]] | None = None,
    resident_free: bool = False,
    threads: int = 4,
    file: str | Path | None = None,
) -> Iterator[OffloadRun]:
    """Keep a model's experts on disk inside a `with` block, and as many in memory as fit.

    Attention and all else stay resident. The checkpoint has its experts in planes (`carpool compress --output`); the
    first time they are written once more beside it, in the order in which they are read (`experts.planes.offload`).

    Args:
        model: a folder (only what is no expert is loaded then), or a model that was loaded with its experts in planes.
        memory: for experts, such as `"4GiB"`, or bytes. What does not fit is read when it is needed.
        cache: which experts leave: `sequence_lfu` (least used in the present requests), `lru`, `lfu`, `lfru`,
            `layer_distance`, `hobbit`, or a rule of `carpool.offloading.rules` that was fitted to a trace.
        scope: `layer`: every layer has an equal part of the memory. `model`: all layers share it.
        on_miss: `"exact"` reads all that is stored: bit for bit the resident model. `"depth(3)"` reads 3 bits of what
            is not there; `"depth([6, 3], [0.5])"` 6 bits of a row's heaviest experts and 3 of those below half of its
            weight (a last depth of 0 leaves out what is not there); `" | floor(0.3)"` behind it keeps the share of a
            row's weight that is read shallow below that.
        prefetch: read what the next layer's router would choose for this layer's input while this one computes.
        deepen: while nothing else is to be read, read on what was read shallow.
        pinned: experts that never leave memory and are never read shallow, by layer (the number in its name):
            outliers, without which a model breaks (arXiv 2507.23279).
        resident_free: policies of `carpool.share` may use what is in memory beside their budget, which then counts
            what is missing. What is answered then hangs on what is in memory, on other requests that is.
        threads: that read.
        file: of the experts; default: beside the checkpoint's.

    Raises:
        CarpoolError: a model without experts in planes or on another device than the CPU, no memory for one expert, an
            unknown rule, a file that is damaged or another model's, a full disk, no compiler for the kernels.
    """
    capacity, misses = bytes_of(memory, "memory"), Misses.parse(on_miss)
    rule = rule_of(cache) if isinstance(cache, str) else cache
    tokenizer: Any = None
    if isinstance(model, nn.Module):
        loaded: Any = model
    else:
        opened = open_model(model)
        if not opened.in_planes:
            raise CarpoolError(f"{model} has no experts in planes; make a copy: carpool compress {model} --output DIR")
        loaded, tokenizer = opened.weights(resident=False), opened.tokenizer
    layers = find_layers(loaded)
    planes = _planes(loaded, layers)
    store = _opened(planes, Path(file) if file is not None else planes.with_name(planes.name + ENDING), layers)
    activations = [layer.planes.activation for layer in layers if layer.planes is not None]
    with torch.inference_mode(False):  # what is made here serves in any mode
        experts = Offloaded(
            store, capacity, rule, misses, activations, threads=threads, deepen=deepen, scope=scope,
            foretell=partial(_foretell, layers) if prefetch else None, pinned=_places(layers, pinned or {}),
        )  # fmt: skip
    begin = loaded.register_forward_pre_hook(partial(_begin, experts), with_kwargs=True)
    before = [layer.planes.read_by(partial(experts.read, place)) for place, layer in enumerate(layers) if layer.planes]
    if resident_free:
        _set_free(layers, [partial(torch.gt, resident_E, 0) for resident_E in experts.resident_LE])
    try:
        yield OffloadRun(loaded, tokenizer, experts)
    finally:
        begin.remove()
        _set_free(layers, [None] * len(layers))
        for layer, reader in zip(layers, before, strict=True):
            assert layer.planes is not None
            layer.planes.read_by(reader)
        experts.close()


def _places(layers: list[MoELayer], pinned: Mapping[int, Collection[int]]) -> list[tuple[int, int]]:
    """Experts by the place of their layer.

    Raises:
        CarpoolError: a layer without experts.
    """
    places = {layer.index: place for place, layer in enumerate(layers)}
    if unknown := sorted(set(pinned) - set(places)):
        raise CarpoolError(f"pinned: layer {unknown[0]} has no experts; those that have are {sorted(places)}")
    return [(places[index], expert) for index, experts in pinned.items() for expert in experts]


def _set_free(layers: list[MoELayer], free: Sequence[Callable[[], Tensor] | None]) -> None:
    for layer, one in zip(layers, free, strict=True):
        assert layer.planes is not None
        layer.planes.free_E = one


def _planes(model: nn.Module, layers: list[MoELayer]) -> Path:
    """The checkpoint's file of planes.

    Raises:
        CarpoolError: the model cannot be offloaded.
    """
    found = planes_of(model)
    if found is None or not all(layer.planes for layer in layers):
        raise CarpoolError(
            "this model's experts are no planes in memory; give its folder, made by carpool compress MODEL --output DIR"
        )
    if any(layer.weight_EH.device.type != "cpu" for layer in layers):
        raise CarpoolError("experts on disk are computed on the CPU; load the model there")
    if not build.ready():
        raise CarpoolError("experts on disk are computed by kernels, which cannot be built here; the log says why")
    return found


def _opened(planes: Path, path: Path, layers: list[MoELayer]) -> Store:
    """The offload file, made if it is not there.

    Raises:
        CarpoolError: it cannot be made, is damaged, or was made from other planes.
    """
    with opened_safetensors(planes) as file:
        source = str((file.metadata() or {}).get("checksum"))
    if not path.exists():
        _make(planes, path, layers, source)
    store = Store(path)
    if store.source != source or store.geometry.layers != tuple(layer.index for layer in layers):
        store.close()
        raise CarpoolError(f"{path} was made from another {planes.name}; delete it, and it is made again")
    return store


def _make(planes: Path, path: Path, layers: list[MoELayer], source: str) -> None:
    places = {layer.index: (place, layer) for place, layer in enumerate(layers)}
    first = StoredExperts.of(Statistics.tensors_of(planes, layers[0].index, ("planes_",)))
    geometry = Geometry(
        tuple(places), first.into.num_experts, first.into.width, first.out.width, first.into.group, first.depths
    )

    def laid_out() -> Iterator[tuple[int, Experts]]:
        for index, tensors in Statistics.by_layer(planes):
            if index not in places:
                continue
            place, layer = places.pop(index)
            stored = StoredExperts.of(tensors)
            shape = stored.into.num_experts, stored.into.width, stored.out.width, stored.into.group, stored.depths
            if shape != (geometry.experts, geometry.hidden, geometry.inner, geometry.group, geometry.depths):
                raise CarpoolError(f"{layer.name} has experts of another shape than the first layer; not supported")
            assert layer.planes is not None
            yield place, Experts.of(stored, layer.planes.activation)
        if places:
            raise CarpoolError(f"{planes} lacks the experts of layer {next(iter(places))}; compress the model again")

    write_store(path, geometry, source, laid_out())


def _foretell(layers: list[MoELayer], place: int, hidden_NH: Tensor) -> list[int]:
    """What the next layer's router makes of the input of this layer's experts: most wanted first."""
    if len(hidden_NH) > AHEAD_ROWS:
        return []
    layer = layers[place + 1]
    weight_EH = layer.weight_EH
    with torch.no_grad():
        native = layer.spec.native((hidden_NH.to(weight_EH.dtype) @ weight_EH.mT).float())
        wanted_E = torch.zeros(layer.num_experts).index_add_(
            0, native.ids_NK.flatten().long(), native.weights_NK.flatten().float()
        )
    return wanted_E.sort(descending=True).indices[: int((wanted_E > 0).sum())].tolist()


def _begin(experts: Offloaded, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward over more than one position reads a prompt: other requests run."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
        experts.begin()
