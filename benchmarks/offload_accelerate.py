"""accelerate's disk offload, which reads all experts of a layer before it runs: for `offload_speed.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from engines import GEOMETRIES, write_config
from offload_limit import forget
from offload_model import EXPERTS


@contextmanager
def offloaded(folder: Path, layers: int) -> Iterator[Callable[[], None]]:
    """A model of 16 bits with all its layers on disk; what is given decodes one token."""
    from dataclasses import replace

    from accelerate import dispatch_model
    from accelerate.utils import offload_weight, save_offload_index
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = GEOMETRIES["qwen3-30b-a3b"]
    shape = replace(shape, experts=EXPERTS, config=shape.config | {"num_experts": EXPERTS})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        config = AutoConfig.from_pretrained(write_config(shape, layers, Path(scratch)))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        index: dict[str, dict] = {}
        for name, one in model.state_dict().items():  # one at a time: all of it does not fit
            index = offload_weight(torch.full(one.shape, 0.01, dtype=one.dtype), name, scratch, index)
        save_offload_index(index, scratch)
        for path in Path(scratch).glob("*.dat"):
            forget(path)
        model = dispatch_model(model, {"": "disk"}, main_device="cpu", offload_dir=scratch, force_hooks=True)

        @torch.no_grad()
        def step() -> None:
            model(torch.tensor([[5]]))

        yield step
