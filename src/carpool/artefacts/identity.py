"""What names a model in the files made from it: its routers, its counts, and a sample of its experts' weights.

`E` experts, `S` sampled weights of each on its way in and as many on its way out, `H` hidden size, `I` intermediate
size, `R` rows of the projections into an expert (gate and up: `2 I`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from carpool.errors import CarpoolError

ENTRIES = 16  # weights into an expert, and out of it
SAMPLES = {"sample_in": "into", "sample_out": "out of"}
EXACT = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIGNED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8)
SIGNS = 0.9  # share of a layer's quantised weights whose sign has to be the original's


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
        digest.update(tensor_bytes(weight_EH.detach().to(torch.bfloat16)))
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Sample:
    """Some weights of every expert of a layer, as far as a host can see them.

    Attributes:
        tensors: bf16 `[E, S]` by name, see `SAMPLES`; NaN where a weight is not seen. Empty where none is.
        hidden_size: `H` of the experts; None where none is seen.
        signs: only the signs are those of the model: the weights are quantised.
        hidden: why no weight is seen.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    hidden_size: int | None = None
    signs: bool = False
    hidden: str = ""


@dataclass(frozen=True, eq=False)
class Identity:
    """What a host can say of the model that it runs.

    Attributes:
        fingerprint: see `fingerprint`. layers: indices of the MoE layers.
        num_experts, top_k: `E` and `K` of a layer. hidden_size: of its experts' input; None where it is not seen.
        samples: of the layers, by index.
    """

    fingerprint: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int | None
    samples: Mapping[int, Sample] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Hex sha256 of routers and sampled experts, as far as they are seen."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for index, found in sorted(self.samples.items()):
            for name, tensor in sorted(found.tensors.items()):
                digest.update(f"{index}:{name};".encode() + tensor_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Held:
    """The expert weights that one host, or one rank of it, holds in a layer, in any strides.

    Attributes:
        into_ERH: gate and up projection, whatever their order, as long as the first row and the last are those of the
            whole; None where they are not.
        out_EHI: down projection.
        width: `I` of the whole expert. first: which of it is this rank's first column.
        places: of every expert in the tensors, -1 where another rank holds it; None: all, in order.
        hidden_size: `H` where the tensors are padded beyond it.
    """

    into_ERH: Tensor | None
    out_EHI: Tensor
    width: int
    first: int = 0
    places: Tensor | None = None
    hidden_size: int | None = None


def sample(layer: int, held: Held) -> Sample:
    """The sample of a layer: weights at places that a hash of layer, `E`, `H` and `I` draws, the same on every host.

    Into an expert half of them lie in the first row and half in the last, which are the same rows in every order of
    gate and up projection; out of it anywhere.
    """
    out_EHI = held.out_EHI.detach()
    if out_EHI.is_meta or out_EHI.dim() != 3 or out_EHI.dtype not in (*EXACT, *SIGNED):
        kind = "weights that are not in memory" if out_EHI.is_meta else f"weights of {out_EHI.dtype}"
        return Sample(hidden=kind)
    places_E = torch.arange(len(out_EHI), device="cpu") if held.places is None else held.places.long().cpu()
    H, columns = held.hidden_size or out_EHI.shape[1], out_EHI.shape[2]
    drawn_3ES = _drawn(f"{layer}:{len(places_E)}x{H}x{held.width}", len(places_E))
    column_ES, row_ES, of_ES = drawn_3ES[0] % H, drawn_3ES[1] % H, drawn_3ES[2] % held.width - held.first
    mine_E1 = (places_E >= 0).unsqueeze(-1)
    seen = {}
    if held.into_ERH is not None:
        last_S = torch.arange(ENTRIES, device="cpu") >= ENTRIES // 2
        rows_S = torch.where(last_S, held.into_ERH.shape[1] - 1, 0)
        there_S = torch.where(last_S, held.first + columns >= held.width, held.first == 0)
        seen["sample_in"] = (held.into_ERH.detach(), rows_S.expand_as(column_ES), column_ES, mine_E1 & there_S)
    seen["sample_out"] = (out_EHI, row_ES, of_ES, mine_E1 & (of_ES >= 0) & (of_ES < columns))
    return Sample({name: _taken(places_E, *one) for name, one in seen.items()}, H, signs=out_EHI.dtype in SIGNED)


def differs(stored: Mapping[str, Tensor], seen: Sample) -> str:
    """What is unlike in a sample that a file holds of a layer and the weights that a host sees; empty if nothing is."""
    for name, mine_ES in seen.tensors.items():
        theirs_ES = stored[name]
        if theirs_ES.shape != mine_ES.shape:
            return f"it has {len(theirs_ES)} experts with weights, not {len(mine_ES)}"
        known_ES = ~mine_ES.isnan()
        if seen.signs:
            known_ES &= (mine_ES != 0) & (theirs_ES != 0)
            unlike = int((known_ES & (mine_ES.sign() != theirs_ES.sign())).sum())
            if unlike > (1 - SIGNS) * int(known_ES.sum()):
                return f"of {int(known_ES.sum())} weights {SAMPLES[name]} its experts {unlike} have another sign"
        elif (unlike_E := (known_ES & (mine_ES != theirs_ES)).any(-1)).any():
            expert = int(unlike_E.nonzero()[0])
            return f"weights {SAMPLES[name]} {int(unlike_E.sum())} of its experts differ, such as expert {expert}'s"
    return ""


def tensor_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they are in memory, in order."""
    return tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _drawn(seed: str, experts: int) -> Tensor:
    """Int64 `[3, E, S]`, each from 0 to 2^31 - 1."""
    count = 3 * experts * ENTRIES
    drawn = torch.frombuffer(bytearray(hashlib.shake_256(seed.encode()).digest(4 * count)), dtype=torch.int32)
    return (drawn.long() & (2**31 - 1)).view(3, experts, ENTRIES)


def _taken(places_E: Tensor, weight_EXX: Tensor, first_ES: Tensor, second_ES: Tensor, seen_ES: Tensor) -> Tensor:
    """The weights at these places in bf16 on the CPU, NaN where they are not seen."""
    device = weight_EXX.device
    index = (
        places_E.unsqueeze(-1).clamp_min(0), first_ES.clamp(0, weight_EXX.shape[1] - 1),
        second_ES.clamp(0, weight_EXX.shape[2] - 1),
    )  # fmt: skip
    taken_ES = weight_EXX[tuple(one.to(device) for one in index)].float().to(torch.bfloat16).cpu()
    return taken_ES.masked_fill(~seen_ES, float("nan"))
