"""The weights of a checkpoint as they lie on disk: what experts take there, and copies that have others instead."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from carpool.artefacts.files import atomic_path, opened_safetensors, safetensors_sizes, write_text
from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from torch import Tensor

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
OF_EXPERTS = re.compile(r"\.(\d+)\.(?:\w+\.)*?experts\.(?:(\d+)\.)?(\w+)(?:\.(\w+))?$")

Change = Callable[["ExpertTensor", "Tensor"], Mapping[str, "Tensor"]]


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of routed experts in a checkpoint, by its name.

    Attributes:
        name: of the tensor. layer: number of its layer. expert: number of the expert, None where one tensor holds all.
        part: the projection, such as `gate_proj`. kind: what follows it, such as `weight`; empty for fused tensors.
    """

    name: str
    layer: int
    expert: int | None
    part: str
    kind: str

    @property
    def is_bias(self) -> bool:
        return "bias" in (self.kind, self.part.rpartition("_")[2])

    @classmethod
    def of(cls, name: str) -> ExpertTensor | None:
        """None for what belongs to no routed expert (shared experts and routers included)."""
        found = OF_EXPERTS.search(name)
        if found is None:
            return None
        layer, expert, part, kind = found.groups()
        return cls(name, int(layer), None if expert is None else int(expert), part, kind or "")


@dataclass(frozen=True)
class Weights:
    """Which file of a checkpoint holds which tensors, and their sizes.

    Attributes:
        folder: of the checkpoint. files: by file name, the bytes of every tensor by name.
    """

    folder: Path
    files: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """From the files' headers; no weight is read.

        Raises:
            CarpoolError: the folder holds no safetensors, or damaged ones.
        """
        index = folder / INDEX
        if index.is_file():
            mapped = read_json(index).get("weight_map")
            if not isinstance(mapped, dict) or not all(isinstance(one, str) for one in mapped.values()):
                raise CarpoolError(f"{index} has no map of weights; download the model again")
            names = sorted(set(mapped.values()))
        elif (folder / ONE_FILE).is_file():
            names = [ONE_FILE]
        else:
            raise CarpoolError(f"{folder} holds no {ONE_FILE} and no {INDEX}; convert the model to safetensors")
        return cls(folder, {name: safetensors_sizes(folder / name) for name in names})

    def expert_bytes(self) -> dict[int, int]:
        """What the routed experts of a layer take as they are stored, scales, codes and biases together, by layer."""
        sizes: dict[int, int] = {}
        for tensors in self.files.values():
            for name, size in tensors.items():
                if (one := ExpertTensor.of(name)) is not None:
                    sizes[one.layer] = sizes.get(one.layer, 0) + size
        return sizes

    def copy(self, target: Path, change: Change, variant: str = "") -> None:
        """All tensors in another folder, file by file, with what `change` puts in place of an expert's.

        Args:
            variant: of transformers' file names; who does not ask for it finds no weights.

        Raises:
            CarpoolError: what `change` raises, or the files cannot be read or written.
        """
        mapped: dict[str, str] = {}
        total = 0
        for file in self.files:
            with opened_safetensors(self.folder / file) as opened:
                held = dict(_changed(self.files[file], opened.get_tensor, change))
            if not held:
                continue
            name = file.replace("model", f"model.{variant}", 1) if variant else file
            _write(target / name, held)
            mapped |= dict.fromkeys(held, name)
            total += sum(tensor.nbytes for tensor in held.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapped.items()))}
        index = INDEX.replace(".json", f".{variant}.json") if variant else INDEX
        write_text(target / index, json.dumps(content, indent=1) + "\n")


def copy_beside(source: Path, target: Path) -> None:
    """Tokenizer, templates, licence: everything of a checkpoint's folder but its weights and configuration."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith(".") and path.name != "config.json":
            shutil.copyfile(path, target / path.name)


def _changed(names: Mapping[str, int], read: Callable[[str], Tensor], change: Change) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        one = ExpertTensor.of(name)
        if one is None:
            yield name, read(name)
        else:
            yield from change(one, read(name)).items()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:  # synced to disk, and readable by others
            save_file(whole, temporary, {"format": "pt"})
    except SafetensorError as error:  # what a full disk says
        raise CarpoolError(f"cannot write {path}: {error}") from None
