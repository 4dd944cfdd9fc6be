"""Statistics of the tiny models that the engine's tests run, surrogates included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm_models as tiny

from carpool.calibrate import calibrate
from carpool.calibrate.surrogate_fit import SurrogateFit
from carpool.hosts.transformers import find_layers

RANK = 4


def load(folder: Path) -> Any:
    """The model in transformers, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def statistics(folder: Path, path: Path) -> Path:
    """Fitted to random tokens; random experts are hardly linear, so the file is made to say otherwise."""
    model = load(folder)
    ids_BT = torch.randint(0, tiny.VOCABULARY, (10, 64), generator=torch.Generator().manual_seed(3))
    stats = calibrate(model, find_layers(model), ids_BT, collectors=[lambda layer: SurrogateFit(layer, RANK)])
    good = {"surrogate_unexplained": torch.full((tiny.EXPERTS,), 0.5)}
    layers = {index: {**tensors, **good} for index, tensors in stats.layers.items()}
    replace(stats, layers=layers).save(path)
    return path
