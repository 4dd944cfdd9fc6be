"""The statistics file: how similar a model's experts are, where that was measured, and every reason to refuse it.

`E` experts, `H` hidden size. A row of a similarity `[E, E]` is the expert to be replaced, a column its replacement;
higher is more similar, an expert with itself is 1. See `docs/statistics.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.files import atomic_path, read_safetensors
from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError

SCHEMA = 1
MIN_TOKENS = 256
SIMILARITIES = {  # name: lowest possible value
    "similarity_frobenius": 0.0,
    "similarity_cosine": -1.0,
    "similarity_cka": -1.0,
    "similarity_routed": float("-inf"),
}
ASYMMETRIC = ("similarity_routed",)
OTHER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool)
TOLERANCE = 1e-5
AGAIN = "run `carpool calibrate` for this model"
FLAGS = {  # of `carpool calibrate`, by how a statistic's name begins
    "sensitivity": " --sensitivity",
    "surrogate_": " --surrogates 16",
    **dict.fromkeys(("easy_ep", "coverage/", "norm_", "gate_sum", "ratio_"), " --energy"),
}


def made_by(name: str) -> str:
    """The command that measures a statistic."""
    return "carpool calibrate" + next((flag for start, flag in FLAGS.items() if name.startswith(start)), "")


def fingerprint(layers: Iterable[tuple[int, Tensor]]) -> str:
    """Hex sha256 that names a model by its routers: `(layer index, router weight [E, H])` in any order.

    Weights are rounded to bf16 first, so that a checkpoint gets one name whether an engine holds it in bf16 or fp32.

    Raises:
        CarpoolError: no layer, an index twice, or a weight that is no matrix.
    """
    weights = sorted(layers, key=lambda layer: layer[0])
    if not weights:
        raise CarpoolError("no MoE layer: a dense model has no fingerprint")
    digest = hashlib.sha256()
    for position, (index, weight_EH) in enumerate(weights):
        if weight_EH.dim() != 2 or (position and weights[position - 1][0] == index):
            shape = list(weight_EH.shape)
            raise CarpoolError(f"layer {index} comes twice, or its router weight of shape {shape} is no matrix")
        digest.update(f"{index}:{weight_EH.shape[0]}x{weight_EH.shape[1]};".encode())
        digest.update(_bytes(weight_EH.detach().to(torch.bfloat16)))
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `carpool calibrate` measured; an instance is always valid.

    Attributes:
        layers: layer index to tensors by name, the same names in every layer: `coverage [E]` int64 (tokens that
            routed there), `similarity_* [E, E]` float32, and whatever else a policy may need (only checked to be
            finite).
        fingerprint: of the model (see `fingerprint`).
        architecture: name of the model's class, for people.
        num_experts: `E`, the same in every layer.
        top_k: experts per token.
        hidden_size: `H`.
        tokens: tokens seen.
        seed: of the choice of text and of the sample for CKA.
        data: `(file name, sha256)` of every text file, in the order given.
        created: date and time, ISO 8601, UTC.
        carpool_version, torch_version: of the run.

    Raises:
        CarpoolError: on construction, if anything above does not hold, a number is not finite, a similarity is
            asymmetric where symmetry is due or an identity matrix, or there are too few tokens.
    """

    layers: Mapping[int, Mapping[str, Tensor]] = field(metadata={"json": False})
    fingerprint: str
    architecture: str
    num_experts: int
    top_k: int
    hidden_size: int
    tokens: int
    seed: int
    data: tuple[tuple[str, str], ...]
    created: str
    carpool_version: str
    torch_version: str

    def __post_init__(self) -> None:
        if not self.layers:
            raise CarpoolError("the statistics hold no layer")
        if not 1 <= self.top_k <= self.num_experts:
            raise CarpoolError(f"the statistics claim {self.top_k} of {self.num_experts} experts per token")
        if self.tokens < MIN_TOKENS:
            raise CarpoolError(f"the statistics come from {self.tokens} tokens; at least {MIN_TOKENS} are needed")
        names = {frozenset(tensors) for tensors in self.layers.values()}
        if len(names) > 1:
            raise CarpoolError(f"the layers do not hold the same statistics; {AGAIN}")
        for index, tensors in self.layers.items():
            _check_layer(index, tensors, self.num_experts, self.tokens)

    def for_layer(self, layer_index: int) -> dict[str, Tensor]:
        """The layer's tensors by name.

        Raises:
            CarpoolError: the file has no such layer.
        """
        if layer_index not in self.layers:
            raise CarpoolError(f"the statistics have no layer {layer_index}, only {_few(sorted(self.layers))}; {AGAIN}")
        return dict(self.layers[layer_index])

    def check(self, fingerprint: str, layers: Sequence[int], num_experts: int) -> None:
        """Refuse another model's statistics.

        Args:
            fingerprint: of the model at hand.
            layers: indices of its MoE layers.
            num_experts: its experts per layer.

        Raises:
            CarpoolError: counts, layers or fingerprint differ.
        """
        if num_experts != self.num_experts:
            counted = self.num_experts
            raise CarpoolError(f"the statistics are of {counted} experts, the model has {num_experts}; {AGAIN}")
        if set(layers) != set(self.layers):
            mine, theirs = _few(sorted(self.layers)), _few(sorted(layers))
            raise CarpoolError(f"the statistics are of layers {mine}, the model's MoE layers are {theirs}; {AGAIN}")
        if fingerprint != self.fingerprint:
            raise CarpoolError(
                f"the statistics are of another model ({self.architecture}, routers {self.fingerprint[:12]}, "
                f"not {fingerprint[:12]}); {AGAIN}"
            )

    def save(self, path: str | Path) -> None:
        """Write the file; an older one stays until the new one is complete.

        Raises:
            CarpoolError: the file cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {
            f"layers.{index}.{name}": tensor.cpu().contiguous().clone()  # the format refuses shared memory
            for index, layer in self.layers.items()
            for name, tensor in layer.items()
        }
        metadata = self._metadata()
        metadata["checksum"] = _checksum(metadata, tensors)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read and check a file.

        Raises:
            CarpoolError: it is missing, no safetensors file, damaged, of another schema, or holds what no
                calibration can have measured.
        """
        path = Path(path)
        tensors, metadata = read_safetensors(path)
        if metadata.get("schema") is None:
            raise CarpoolError(f"{path} is no statistics file of carpool; make one with `carpool calibrate`")
        if metadata["schema"] != str(SCHEMA):
            raise CarpoolError(f"{path} has schema {metadata['schema']!r}, this version reads {SCHEMA}; {AGAIN}")
        try:
            stats = cls(layers=_by_layer(tensors), **_parse(cls, metadata))
        except CarpoolError as error:
            raise CarpoolError(f"{path}: {error}") from None
        checksum = metadata.pop("checksum", "")
        if checksum != _checksum(metadata, tensors):
            raise CarpoolError(f"{path} is damaged: its checksum differs; {AGAIN} or fetch the file anew")
        return stats

    def _metadata(self) -> dict[str, str]:
        values = {f.name: json.dumps(getattr(self, f.name)) for f in fields(self) if f.metadata.get("json", True)}
        return {"schema": str(SCHEMA), **values}


def _check_layer(index: int, tensors: Mapping[str, Tensor], num_experts: int, tokens: int) -> None:
    if "coverage" not in tensors or len(tensors) < 2:
        raise CarpoolError(f"layer {index} holds only {sorted(tensors)}, no coverage or nothing beside it; {AGAIN}")
    for name, tensor in tensors.items():
        where = f"layer {index}: {name}"
        if name in SIMILARITIES:
            _check_kind(where, tensor, torch.float32, [num_experts, num_experts])
            _check_similarity(where, name, tensor)
        elif name == "coverage":
            _check_kind(where, tensor, torch.int64, [num_experts])
            if not ((tensor >= 0) & (tensor <= tokens)).all():
                raise CarpoolError(f"{where} must lie between 0 and the {tokens} tokens seen; {AGAIN}")
        elif tensor.dtype not in OTHER_DTYPES or not tensor.isfinite().all():
            raise CarpoolError(f"{where} is {tensor.dtype} or holds NaN or inf; {AGAIN}")


def _check_kind(where: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise CarpoolError(f"{where} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}; {AGAIN}")


def _check_similarity(where: str, name: str, similarity_EE: Tensor) -> None:
    if not similarity_EE.isfinite().all():
        raise CarpoolError(f"{where} holds NaN or inf; {AGAIN}")
    lowest = SIMILARITIES[name]
    found = (float(similarity_EE.min()), float(similarity_EE.max()))
    if found[0] < lowest - TOLERANCE or found[1] > 1 + TOLERANCE:
        raise CarpoolError(f"{where} goes from {found[0]:.3g} to {found[1]:.3g}, outside [{lowest:g}, 1]; {AGAIN}")
    if (similarity_EE.diagonal() - 1).abs().max() > TOLERANCE:
        raise CarpoolError(f"{where}: an expert's similarity with itself is not 1; {AGAIN}")
    if name not in ASYMMETRIC and (similarity_EE - similarity_EE.T).abs().max() > TOLERANCE:
        raise CarpoolError(f"{where} is not symmetric; {AGAIN}")
    # two experts: their distance is the layer's largest, so that Frobenius similarity is 0 by definition
    if len(similarity_EE) > 2 and torch.equal(similarity_EE, torch.eye(len(similarity_EE))):
        raise CarpoolError(f"{where} is the identity matrix, so it was never calibrated; {AGAIN}")


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, index, name = key.split(".", 2) if key.count(".") > 1 else ("", "", key)
        if prefix != "layers" or not (index.isascii() and index.isdigit()):
            raise CarpoolError(f"tensor {key!r} is none of carpool's; {AGAIN}")
        layers.setdefault(int(index), {})[name] = tensor
    return layers


def _parse(cls: type[Statistics], metadata: Mapping[str, str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for f in fields(cls):
        if not f.metadata.get("json", True):
            continue
        if f.name not in metadata:
            raise CarpoolError(f"the entry {f.name!r} is missing; {AGAIN}")
        value = parse_json(metadata[f.name], f"the entry {f.name!r}")
        kind = {"int": int, "str": str}.get(str(f.type), list)
        if type(value) is not kind:
            raise CarpoolError(f"the entry {f.name!r} is {value!r}, not of type {f.type}; {AGAIN}")
        parsed[f.name] = value
    if not all(isinstance(entry, list) and list(map(type, entry)) == [str, str] for entry in parsed["data"]):
        raise CarpoolError(f"the entry 'data' must list names and sha256 of files; {AGAIN}")
    parsed["data"] = tuple(map(tuple, parsed["data"]))
    return parsed


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _few(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:4]))
    return shown if len(indices) <= 5 else f"{shown}, ... ({len(indices)})"
