"""Experts in planes: quantises every layer's experts and measures what `depth` has to know of them.

`B` sequences, `T` tokens each, `N` rows, `E` experts, `K` experts per token, `L` depths, `V` powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from carpool.calibrate.capture import Layer, Routed, calm, capture
from carpool.calibrate.moments import Moments, Projections, by_expert
from carpool.calibrate.run import BATCH_TOKENS, require_fitting
from carpool.calibrate.super_experts import stream_peaks, super_experts
from carpool.calibrate.token_quantiles import TokenQuantiles
from carpool.errors import CarpoolError
from carpool.experts.planes import GROUP, MIDDLE
from carpool.experts.rounding import nested_feedback, nested_round
from carpool.experts.stored import StoredExperts

Method = Literal["energy", "moequant", "gptq", "round"]
POWERS: dict[Method, int] = {"energy": 2, "moequant": 1, "gptq": 0, "round": 0}  # of the gate's weight
DEPTHS = (2, 3, 4, 5, 6)
OCTAVES = 9  # numbers of voters: 1, 2, ..., 256
SAMPLES = 32  # batches of each
LAYERS_AT_ONCE_NUMBERS = 1 << 29  # second moments held at once, 2 GiB


def compress(
    model: Any,
    layers: Sequence[Layer],
    sequences_BT: Tensor,
    held_B: Tensor,
    *,
    depths: tuple[int, ...] = DEPTHS,
    group: int = GROUP,
    method: Method = "energy",
    centre: float = MIDDLE,
    seed: int = 0,
    known: Mapping[int, dict[str, Tensor]] | None = None,
    done: Callable[[int, dict[str, Tensor]], None] = lambda layer, tensors: None,
) -> dict[int, dict[str, Tensor]]:
    """Every layer's experts in planes, with the statistics of `carpool.policies.Depth`, by layer index.

    The experts of a layer are quantised on the tokens that its router sends them, with the hidden states of the
    unquantised model. Memory beyond the model: the second moments of as many layers as fit `LAYERS_AT_ONCE_NUMBERS`,
    whose forward passes are made together.

    Args:
        sequences_BT: token ids without padding. held_B: the sequences that measure what the others decide.
        depths: offered ones, ascending. group: inputs that share a scale.
        method: `round` to the nearest; `gptq` with error feedback by the inputs' second moments; `moequant` the same
            with every token counted by its gate weight, `energy` by that squared, as the lost energy counts it.
        centre: of a cell of the quantiser (see `carpool.experts.planes.Planes`).
        seed: of the sampled batches.
        known: layers that an earlier run has done.
        done: given every layer's index and tensors as soon as they are known.

    Raises:
        CarpoolError: sequences that do not fit the model, experts that cannot be compressed, or no text to measure on.
    """
    require_fitting(model, sequences_BT)
    if not held_B.any() or held_B.all():
        raise CarpoolError("the text leaves no sequence to measure on, or none to fit to: give more text")
    found: dict[int, dict[str, Tensor]] = dict(known or {})
    with torch.inference_mode(), calm(model):
        for some in _chunks([layer for layer in layers if layer.index not in found]):
            moments = [Moments(Projections(layer), POWERS[method]) for layer in some]
            for routed in _passes(model, some, sequences_BT[~held_B]):
                for moment, one in zip(moments, routed, strict=True):
                    moment.update(one)
            held = [_joined(list(one)) for one in zip(*_passes(model, some, sequences_BT[held_B]), strict=True)]
            for layer, moment, seen in zip(some, moments, held, strict=True):
                stored = _quantised(moment, depths, group, method, centre)
                measured = measure(moment.projections, stored, seen, seed)
                found[layer.index] = {
                    **stored.tensors(), **measured, "coverage": moment.coverage_E.cpu(), **layer.sample().tensors,
                }  # fmt: skip
                done(layer.index, found[layer.index])
    peaks, streams = ({index: one[name] for index, one in found.items()} for name in ("depth_peak", "depth_stream"))
    outliers = super_experts(peaks, streams)
    return {layer.index: found[layer.index] | {"depth_super": outliers[layer.index]} for layer in layers}


def lost(tensors: Mapping[str, Tensor]) -> Tensor:
    """Share of a layer's output energy that each depth loses, `[L]`, where all experts are used alike."""
    energy_E = tensors["depth_energy"]
    return (tensors["depth_error"] * energy_E).sum(-1) / energy_E.sum().clamp_min(1e-30)


def measure(projections: Projections, stored: StoredExperts, seen: Routed, seed: int) -> dict[str, Tensor]:
    """`depth_energy [E]`, `depth_error [L, E]`, `depth_bytes [L]`, `depth_use [V, S, E]`, `depth_gate [E]` on tokens
    that the quantiser did not see (see `carpool.policies.Depth`), and what is usual for these tokens
    (`carpool.calibrate.token_quantiles`). An expert without any has the layer's mean."""
    E, depths = len(projections.into_ERH), stored.depths
    energy_E, count_E = torch.zeros(2, E)
    error_LE, peak_E = torch.zeros(len(depths), E), torch.zeros(E)
    added_NH = torch.zeros_like(seen.hidden_NH, dtype=torch.float32)
    for expert, rows_C, weight_C in by_expert(seen, E):
        hidden_CH, one = seen.hidden_NH[rows_C].float(), slice(expert, expert + 1)
        whole_CH = projections.output(projections.between(hidden_CH, expert), expert)
        energy_E[expert], count_E[expert] = whole_CH.square().sum(), len(rows_C)
        peak_E[expert] = whole_CH.abs().amax()
        added_NH.index_add_(0, rows_C, whole_CH * weight_C.unsqueeze(-1))
        into, out = stored.into.of_experts(one), stored.out.of_experts(one)
        for place, depth in enumerate(depths):
            between_CI = projections.between(hidden_CH, expert, into.read(depth)[0])
            error_CH = projections.output(between_CI, expert, out.read(depth)[0]) - whole_CH
            error_LE[place, expert] = error_CH.square().sum()
    known_E = energy_E > 0
    share_LE = torch.where(
        known_E, error_LE / energy_E.clamp_min(1e-30), error_LE.sum(-1, keepdim=True) / energy_E.sum()
    )
    mean_E = torch.where(known_E, energy_E / count_E.clamp_min(1), energy_E.sum() / count_E.sum().clamp_min(1))
    sizes = stored.sizes[list(depths)]
    usual = TokenQuantiles(seen.weights_NK.shape[1])
    usual.update(seen.hidden_NH.cpu(), seen.weights_NK.cpu())
    return {
        "depth_energy": mean_E,
        "depth_error": share_LE.clamp(0, 1),
        "depth_bytes": sizes.float(),
        "depth_use": _use(seen, E, seed),
        "depth_gate": _gate(seen, E),
        "depth_peak": peak_E,
        "depth_stream": stream_peaks(seen.residual_NH, added_NH),
        **usual.result(),
    }


def _use(seen: Routed, num_experts: int, seed: int) -> Tensor:
    """Sums of squared shares of weight over random batches of `2**v` tokens, float32 `[V, S, E]`."""
    share_NK = seen.weights_NK.float() / seen.weights_NK.float().sum(-1, keepdim=True).clamp_min(1e-30)
    use_NE = torch.zeros(len(share_NK), num_experts).scatter_add_(-1, seen.ids_NK.long().cpu(), share_NK.square().cpu())
    generator = torch.Generator("cpu").manual_seed(seed)
    sums = []
    for octave in range(OCTAVES):
        drawn_SB = torch.randint(len(use_NE), (SAMPLES, 2**octave), generator=generator)
        sums.append(use_NE[drawn_SB].sum(1))
    return torch.stack(sums)


def _gate(seen: Routed, num_experts: int) -> Tensor:
    """Share of the router's weight that each expert gets, float32 `[E]`."""
    sums_E = torch.zeros(num_experts, dtype=torch.float64)
    sums_E.index_add_(0, seen.ids_NK.flatten().long().cpu(), seen.weights_NK.flatten().double().cpu())
    return (sums_E / sums_E.sum()).float()


def _quantised(moment: Moments, depths: tuple[int, ...], group: int, method: Method, centre: float) -> StoredExperts:
    pairs = (
        (moment.projections.into_ERH, moment.into_EHH),
        (moment.projections.out_EHI, moment.out_EII),
    )
    if method == "round":
        return StoredExperts(*(nested_round(weight_ERI, depths, group, centre) for weight_ERI, _ in pairs))
    return StoredExperts(
        *(nested_feedback(weight_ERI, moment_EII, depths, group, centre) for weight_ERI, moment_EII in pairs)
    )


def _chunks(layers: Sequence[Layer]) -> list[list[Layer]]:
    chunks: list[list[Layer]] = []
    room = 0
    for layer in layers:
        held = {name: one.numel() for name, one in layer.experts.named_parameters()}
        hidden = layer.weight_EH.shape[1]
        width = held.get("down_proj", 0) // (layer.num_experts * hidden)
        size = layer.num_experts * (hidden**2 + width**2)
        if not chunks or size > room:
            chunks.append([])
            room = LAYERS_AT_ONCE_NUMBERS
        chunks[-1].append(layer)
        room -= size
    return chunks


def _passes(model: Any, layers: Sequence[Layer], sequences_BT: Tensor) -> Iterator[list[Routed]]:
    rows = max(1, BATCH_TOKENS // sequences_BT.shape[1])
    for ids_BT in sequences_BT.split(rows):
        yield capture(model, layers, ids_BT)


def _joined(parts: list[Routed]) -> Routed:
    streams = [part.residual_NH for part in parts if part.residual_NH is not None]
    return Routed(
        torch.cat([part.hidden_NH for part in parts]),
        torch.cat([part.ids_NK for part in parts]),
        torch.cat([part.weights_NK for part in parts]),
        torch.cat(streams) if all(part.residual_NH is not None for part in parts) else None,
    )
