"""What the checkpoint of a model says of its experts: what they take on disk, and whether they are planes of bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from carpool.artefacts.checkpoint import planes_in, read_recipe
from carpool.artefacts.json_text import read_json
from carpool.artefacts.model_source import folder_of
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.weights import Weights
from carpool.experts.stored import MATRICES, NAMES, StoredExperts
from carpool.hosts.transformers.layers import MoELayer, find_layers, identity


def planes_of(model: Any) -> Path | None:
    """The file with the experts of a loaded model, by where it was loaded from; None where its folder has usual
    weights."""
    folder = _folder(model)
    return None if folder is None else planes_in(_configuration(folder), folder)


def fill(model: Any, path: Path) -> None:
    """Give a model whose experts are planes their weights at the deepest depth.

    Raises:
        CarpoolError: the file is another model's, or damaged.
    """
    stats, layers = Statistics.load(path, leave=NAMES), {layer.index: layer for layer in find_layers(model)}
    for index, tensors in Statistics.by_layer(path):
        if index not in layers:
            continue
        layer = layers[index]
        stored, held = StoredExperts.of(tensors, layer.weight_EH.device), dict(layer.experts.named_parameters())
        with torch.no_grad():
            for name, weight in stored.weights(layer.experts, stored.depths[-1]).items():
                held[name].copy_(weight)
    stats.check(identity(list(layers.values())))


def matrices(model: Any) -> set[str]:
    """Names of the experts' weights, biases excepted."""
    return {
        f"{layer.name}.experts.{name}"
        for layer in find_layers(model)
        for name, _ in layer.experts.named_parameters()
        if name in MATRICES
    }


def shares_stored(model: Any, layers: Sequence[MoELayer]) -> list[float]:
    """What the experts take in the checkpoint over what they would in 16 bits, by layer; 1 where it is not quantised,
    whatever the model computes in."""
    in_planes = [layer.planes for layer in layers if layer.planes is not None]
    if len(in_planes) == len(layers):
        return [float(one.sizes[one.depths[-1]]) for one in in_planes]
    folder = _folder(model)
    config = {} if folder is None else _configuration(folder)
    if folder is None or not config.get("quantization_config"):
        return [1.0] * len(layers)
    if planes_in(config, folder) is not None:
        read = read_recipe(folder).get("sizes", {}).get("read", {})
        return [float(max(read.values(), default=1.0))] * len(layers)
    held = Weights.of(folder).expert_bytes()
    whole = [2 * sum(one.numel() for one in layer.experts.parameters()) for layer in layers]
    return [held.get(layer.index, size) / size if size else 1.0 for layer, size in zip(layers, whole, strict=True)]


def _folder(model: Any) -> Path | None:
    name = getattr(model, "name_or_path", "") or ""
    return folder_of(name) if name else None


def _configuration(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "config.json")
    return content if isinstance(content, dict) else {}
