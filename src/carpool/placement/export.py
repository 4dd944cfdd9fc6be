"""Placements in the formats of engines: SGLang's expert location, KTransformers' frequencies; vLLM reads our own file.

`L` MoE layers, `D` devices, `S` slots of each, `E` experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.files import atomic_path, write_text
from carpool.artefacts.trace import Trace
from carpool.errors import CarpoolError
from carpool.placement.demand import loads_LE
from carpool.placement.placement import Placement


def physical_to_logical(placement: Placement, layers: tuple[int, ...], num_layers: int) -> list[list[int]]:
    """The expert of every physical one, by layer of the model: layers without a placement (dense ones) have experts in
    order, repeated where there are replicas.

    Args:
        layers: numbers of the placement's layers. num_layers: of the whole model.
    """
    physical = placement.devices * placement.slots
    usual = [place % placement.num_experts for place in range(physical)]
    found = [list(usual) for _ in range(num_layers)]
    for layer, expert_DS in zip(layers, placement.expert_LDS, strict=True):
        if layer >= num_layers:
            raise CarpoolError(f"the placement has a layer {layer}, the model has {num_layers} layers")
        found[layer] = expert_DS.flatten().tolist()
    return found


def sglang_location(placement: Placement, layers: tuple[int, ...], num_layers: int) -> dict[str, Any]:
    """What `--init-expert-location FILE.json` takes, for `--ep-size D --ep-num-redundant-experts D * S - E`."""
    return {"physical_to_logical_map": physical_to_logical(placement, layers, num_layers)}


def expert_frequencies(trace: Trace, num_layers: int) -> Tensor:
    """Int64 `[layers of the model, E]`: how many rows of a trace computed each expert, 0 in layers without experts."""
    counts = torch.zeros(num_layers, trace.num_experts, dtype=torch.int64)
    counts[torch.tensor(trace.facts.layers)] = loads_LE(trace)
    return counts


def write_sglang(path: Path, placement: Placement, layers: tuple[int, ...], num_layers: int) -> None:
    """Write SGLang's JSON; raises CarpoolError if the file cannot be written."""
    write_text(path, json.dumps(sglang_location(placement, layers, num_layers)) + "\n")


def write_ktransformers(path: Path, trace: Trace, num_layers: int) -> None:
    """Write what SGLang's recorder of expert distributions writes, `logical_count [1, layers, E]`, which KTransformers
    reads for `--kt-expert-placement-strategy frequency`; raises CarpoolError if the file cannot be written."""
    counts = expert_frequencies(trace, num_layers).unsqueeze(0)
    with atomic_path(path) as temporary:
        torch.save({"logical_count": counts}, temporary)
