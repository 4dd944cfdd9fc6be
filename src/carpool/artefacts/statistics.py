"""The statistics file: how similar a model's experts are, where that was measured, and every reason to refuse it.

`E` experts, `H` hidden size. A row of a similarity `[E, E]` is the expert to be replaced, a column its replacement;
higher is more similar, an expert with itself is 1. See `docs/statistics.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from carpool.artefacts.checksum import Checksum, checksum_of
from carpool.artefacts.files import atomic_path, opened_safetensors, read_safetensors, safetensors_names
from carpool.artefacts.identity import SAMPLES, Identity, Sample, differs
from carpool.artefacts.json_text import parse_json
from carpool.artefacts.tensor_checks import AGAIN, check_layer
from carpool.errors import CarpoolError

SCHEMA = 1
MIN_TOKENS = 256
LONGEST_INDEX = 6  # digits of a layer's number
OF_ROUTERS = (
    "coverage",
    "sensitivity",
    "gate_sum",
    "ratio_quantiles",
    "l1_quantiles",
    "coactivation",
)  # how such names begin
COMPRESSED = ("planes_", "depth_")  # how the names of what `carpool compress` makes begin
FLAGS = {  # of `carpool calibrate`, by how a statistic's name begins
    "sensitivity": " --sensitivity",
    "surrogate_": " --surrogates 16",
    **dict.fromkeys(
        ("easy_ep", "reap", "coverage/", "norm_", "gate_sum", "ratio_", "l1_", "coactivation"), " --energy"
    ),
}


def made_by(name: str) -> str:
    """The command that measures a statistic, with MODEL for what only the user knows; a domain's is named after its
    file of text."""
    if name.startswith(COMPRESSED):
        return "carpool compress MODEL -o experts.safetensors"
    flag = next((flag for start, flag in FLAGS.items() if name.startswith(start)), "")
    domain = name.partition("/")[2]
    return f"carpool calibrate MODEL{f' --text {domain}.jsonl' if domain else ''}{flag} -o stats.safetensors"


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `carpool calibrate` measured; an instance is always valid.

    Attributes:
        layers: layer index to tensors by name, the same names in every layer: `coverage [E]` int64 (tokens that
            routed there), `similarity_* [E, E]` float32, `sample_in [E, S]` and `sample_out [E, S]` bf16 (weights of
            the experts, see `carpool.artefacts.identity.sample`), and whatever else a policy may need (only checked
            to be finite).
        fingerprint: of the model's routers (see `carpool.artefacts.identity.fingerprint`).
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
        of_experts = {name for name in next(iter(names)) if not name.startswith(OF_ROUTERS)} - SAMPLES.keys()
        if of_experts and not SAMPLES.keys() <= next(iter(names)):
            raise CarpoolError(
                f"the statistics hold {min(of_experts)!r} and no sample of the weights that it was measured on, so "
                f"that nobody could tell another model's; {AGAIN}"
            )
        for index, tensors in self.layers.items():
            check_layer(index, tensors, self.num_experts, self.tokens)

    def for_layer(self, layer_index: int) -> dict[str, Tensor]:
        """The layer's tensors by name.

        Raises:
            CarpoolError: the file has no such layer.
        """
        if layer_index not in self.layers:
            raise CarpoolError(f"the statistics have no layer {layer_index}, only {_few(sorted(self.layers))}; {AGAIN}")
        return dict(self.layers[layer_index])

    def check(self, model: Identity) -> str:
        """Refuse another model's statistics.

        Returns:
            What the host could not compare, in one sentence for its log; empty where it saw enough.

        Raises:
            CarpoolError: counts, layers, routers or the experts' weights differ.
        """
        for what, mine, theirs in (
            ("{} experts", self.num_experts, model.num_experts),
            ("{} experts a token", self.top_k, model.top_k),
            ("experts of width {}", self.hidden_size, model.hidden_size),
        ):
            if theirs not in (mine, None):
                raise CarpoolError(f"the statistics are of {what.format(mine)}, the model has {theirs}; {AGAIN}")
        if set(model.layers) != set(self.layers):
            known, found = _few(sorted(self.layers)), _few(sorted(model.layers))
            raise CarpoolError(f"the statistics are of layers {known}, the model's MoE layers are {found}; {AGAIN}")
        if model.fingerprint != self.fingerprint:
            raise CarpoolError(
                f"the statistics are of another model ({self.architecture}, routers {self.fingerprint[:12]}, "
                f"not {model.fingerprint[:12]}); {AGAIN}"
            )
        return self._check_experts(model.samples)

    def _check_experts(self, samples: Mapping[int, Sample]) -> str:
        hidden: dict[int, str] = {}
        for index, stored in self.layers.items():
            if not SAMPLES.keys() <= stored.keys():
                continue
            mine = samples.get(index, Sample(hidden="weights that were not looked at"))
            if unlike := differs(stored, mine):
                raise CarpoolError(
                    f"the statistics are of another model with the same routers: in layer {index} {unlike}; {AGAIN}"
                )
            if not mine.tensors:
                hidden[index] = mine.hidden
        if not hidden:
            return ""
        index, cause = next(iter(hidden.items()))
        return (
            f"the experts of {len(hidden)} of {len(self.layers)} layers could not be compared with the statistics "
            f"(layer {index}: {cause}), only their routers: make sure that the file was made for these weights"
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
        metadata["checksum"] = checksum_of(metadata, tensors).hex
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path, leave: tuple[str, ...] = ()) -> Statistics:
        """Read and check a file.

        Args:
            leave: how names of statistics begin that are not read (experts in planes are as large as a model); the
                checksum of a file that holds some is not looked at.

        Raises:
            CarpoolError: it is missing, no safetensors file, damaged, of another schema, or holds what no
                calibration can have measured.
        """
        path = Path(path)
        tensors, metadata = read_safetensors(path, lambda key: not _name(key).startswith(leave))
        if metadata.get("schema") is None:
            raise CarpoolError(
                f"{path} is no statistics file of carpool; make one with `carpool calibrate MODEL -o stats.safetensors`"
            )
        if metadata["schema"] != str(SCHEMA):
            raise CarpoolError(f"{path} has schema {metadata['schema']!r}, this version reads {SCHEMA}; {AGAIN}")
        try:
            stats = cls(layers=_by_layer(tensors), **_parse(cls, metadata))
        except CarpoolError as error:
            raise CarpoolError(f"{path}: {error}") from None
        checksum = metadata.pop("checksum", "")
        left = bool(leave) and any(name.startswith(leave) for name in cls.names_in(path))
        if not left:
            checksum_of(metadata, tensors).check(checksum, path, AGAIN)
        return stats

    @staticmethod
    def names_in(path: str | Path) -> frozenset[str]:
        """Names of the statistics in a file, from its header alone: what the file is worth, `load` finds out.

        Raises:
            CarpoolError: missing, no safetensors file, or its header is damaged.
        """
        return frozenset(map(_name, safetensors_names(path)))

    @staticmethod
    def tensors_of(path: str | Path, layer_index: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        """One layer's tensors whose names begin so, from a file of which nothing else is read or checked.

        Raises:
            CarpoolError: missing, no safetensors file, damaged, or it has none of them.
        """
        start = f"layers.{layer_index}."
        found, _ = read_safetensors(path, lambda key: key.startswith(start) and _name(key).startswith(names))
        if not found:
            raise CarpoolError(f"{path} holds no {names[0]}* of layer {layer_index}; {AGAIN}")
        return {_name(key): tensor for key, tensor in found.items()}

    @staticmethod
    def by_layer(path: str | Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """A file's layers with all their tensors, one in memory at a time; the checksum is known after the last one.

        Raises:
            CarpoolError: missing, no safetensors file, damaged, or no file of carpool's.
        """
        with opened_safetensors(path) as file:
            metadata = dict(file.metadata() or {})
            expected, found = metadata.pop("checksum", ""), Checksum(metadata)
            for _, names in groupby(sorted(file.keys()), lambda key: key.split(".", 2)[:2]):
                layer = {}
                for name in names:
                    layer[name] = file.get_tensor(name).clone()
                    found.add(name, layer[name])
                [(index, tensors)] = _by_layer(layer).items()
                yield index, tensors
        found.check(expected, path, AGAIN)

    def _metadata(self) -> dict[str, str]:
        values = {f.name: json.dumps(getattr(self, f.name)) for f in fields(self) if f.metadata.get("json", True)}
        return {"schema": str(SCHEMA), **values}


def _name(key: str) -> str:
    """Of the statistic that a file's tensor is, without its layer."""
    return key.split(".", 2)[-1]


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, index, name = key.split(".", 2) if key.count(".") > 1 else ("", "", key)
        if prefix != "layers" or not (index.isascii() and index.isdigit() and len(index) <= LONGEST_INDEX):
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


def _few(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:4]))
    return shown if len(indices) <= 5 else f"{shown}, ... ({len(indices)})"
