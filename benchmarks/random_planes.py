"""Random experts in planes, for benchmarks: what is computed, and how fast, does not hang on what the bits say.

Torch alone, but for `write_checkpoint`: a whole model in transformers format, layer by layer, so that a model fits that
is larger than the memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.experts.planes import Planes
from carpool.experts.stored import StoredExperts

PLANES_FILE, WEIGHTS_FILE = "experts.planes", "model.carpool.safetensors"
TYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def random_planes(
    experts: int, rows: int, width: int, depths: tuple[int, ...], group: int, generator: torch.Generator
) -> Planes:
    """Matrices whose products are of the size of their input, on the generator's device."""
    device = generator.device
    size = depths[-1] * experts * rows * width // 8
    words = torch.empty(-(-size // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.uint8)[:size].view(depths[-1], experts, rows, width // 8)
    scale = torch.rand(experts, rows, -(-width // group), generator=generator, device=device) + 0.5
    scale_LERG = torch.stack([(scale * 2.0**-depth).half() for depth in depths])
    return Planes(bits, scale_LERG, torch.full((experts,), 4 * width**-0.5, device=device), depths, width, group)


def random_experts(
    experts: int, hidden: int, inner: int, depths: tuple[int, ...], group: int, generator: torch.Generator
) -> StoredExperts:
    """A layer's experts."""
    into = random_planes(experts, 2 * inner, hidden, depths, group, generator)
    return StoredExperts(into, random_planes(experts, hidden, inner, depths, group, generator))


def write_checkpoint(
    geometry: Any,
    layers: int,
    folder: Path,
    depths: tuple[int, ...],
    group: int,
    seed: int,
    vocabulary: int | None = None,
) -> Path:
    """Random weights in bf16, the experts as random planes; nothing of it is ever whole in memory.

    Args:
        geometry: of its layers, one of `engines.GEOMETRIES`. vocabulary: default: `engines.VOCABULARY`.
    """
    from engines import VOCABULARY, write_config
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from carpool.artefacts.identity import fingerprint

    write_config(geometry, layers, folder, VOCABULARY if vocabulary is None else vocabulary)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(1 << 24, generator=generator)

    def random(shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        made = torch.empty(shape.numel(), dtype=torch.bfloat16)
        for part in made.split(len(source) // 2):
            first = int(torch.randint(len(source) // 2, (1,), generator=generator))
            part.copy_(source[first : first + len(part)] * shape[-1] ** -0.5)
        return made.view(shape)

    held = {name: random(one.shape) for name, one in model.state_dict().items() if ".experts." not in name}
    save_file(held, folder / WEIGHTS_FILE, {"format": "pt"})
    routers = fingerprint((index, held[f"model.layers.{index}.mlp.gate.weight"]) for index in range(layers))
    del held
    _write_planes(folder / PLANES_FILE, geometry, layers, depths, group, routers, generator)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "carpool", "file": PLANES_FILE, "depths": list(depths), "group_size": group,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_planes(
    path: Path,
    geometry: Any,
    layers: int,
    depths: tuple[int, ...],
    group: int,
    routers: str,
    generator: torch.Generator,
) -> None:
    """A statistics file in the format of safetensors, a layer at a time."""
    from carpool.artefacts.checksum import Checksum
    from carpool.artefacts.files import read_safetensors
    from carpool.artefacts.identity import ENTRIES, SAMPLES, tensor_bytes
    from carpool.artefacts.statistics import Statistics

    experts = geometry.experts

    def beside(sizes: Tensor) -> dict[str, Tensor]:
        return {
            "depth_bytes": sizes[list(depths)].float(), "depth_energy": torch.ones(experts),
            "depth_error": (4.0 ** -torch.tensor(depths)).unsqueeze(-1).repeat(1, experts),
            "depth_use": torch.rand(7, 4, experts, generator=generator),
            "coverage": torch.full((experts,), 1000),
            **{name: torch.zeros(experts, ENTRIES).bfloat16() for name in SAMPLES},
        }  # fmt: skip

    def made() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for index in sorted(range(layers), key=lambda one: f"{one}."):  # the order of the names
            stored = random_experts(experts, geometry.hidden, geometry.intermediate, depths, group, generator)
            yield index, stored.tensors() | beside(stored.sizes)

    with tempfile.TemporaryDirectory() as folder:  # what the file says of itself
        small = Path(folder) / "small.safetensors"
        Statistics(
            layers={index: beside(torch.ones(17)) for index in range(layers)}, fingerprint=routers,
            architecture="random", num_experts=experts, top_k=geometry.top_k, hidden_size=geometry.hidden,
            tokens=1000 * experts // geometry.top_k, seed=0, data=(), created="", carpool_version="", torch_version="",
        ).save(small)  # fmt: skip
        _, metadata = read_safetensors(small)
    metadata["checksum"] = ""
    state = generator.get_state()
    _, first = next(made())
    generator.set_state(state)
    places, end = {}, 0
    for name, one in sorted(first.items(), key=lambda item: -item[1].element_size()):
        for index in range(layers):
            places[f"layers.{index}.{name}"] = (end, one)
            end += one.nbytes
    header = {
        name: {"dtype": TYPES[one.dtype], "shape": list(one.shape), "data_offsets": [start, start + one.nbytes]}
        for name, (start, one) in places.items()
    }
    checksum = Checksum({name: value for name, value in metadata.items() if name != "checksum"})

    def head(checked: str) -> bytes:
        text = json.dumps({"__metadata__": metadata | {"checksum": checked}, **header}).encode()
        return len(text + b" " * (-len(text) % 8)).to_bytes(8, "little") + text + b" " * (-len(text) % 8)

    start = len(head("0" * 64))
    with path.open("wb") as file:
        for index, tensors in made():
            for name in sorted(tensors):
                full = f"layers.{index}.{name}"
                checksum.add(full, tensors[name])
                file.seek(start + places[full][0])
                file.write(tensor_bytes(tensors[name]))
        file.seek(0)
        file.write(head(checksum.hex))
