"""One pass over the text: run every expert on every token and measure how far they stand in for one another.

`B` sequences, `T` tokens each, `N` rows of a batch, `E` experts, `K` experts per token, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.identity import SAMPLES, fingerprint
from carpool.artefacts.origin import now, version
from carpool.artefacts.statistics import Statistics
from carpool.calibrate.capture import Collector, Experts, Layer, Routed, Seen, calm, capture
from carpool.calibrate.easy_ep import EasyEP
from carpool.calibrate.energy import Energy
from carpool.calibrate.sequences import HELD_OUT
from carpool.calibrate.similarity import CKA, Similarity
from carpool.errors import CarpoolError

BATCH_TOKENS = 2048  # tokens of one forward pass of the model
CHUNK_NUMBERS = 1 << 22  # numbers in the expert outputs held at once (32 MB in fp64)
CKA_TOKENS = 512
MIXTURE_TOLERANCE = 1e-2  # relative, between the experts one by one and together

MakeCollector = Callable[[Layer], Collector]


def calibrate(
    model: Any,
    layers: Sequence[Layer],
    sequences_BT: Tensor,
    *,
    domains: Sequence[str] = (),
    held_B: Tensor | None = None,
    data: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    energy: bool = False,
    collectors: Sequence[MakeCollector] = (),
    progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Statistics of all MoE layers from one pass of the model over the sequences.

    Every expert runs on all tokens in fp32, layer by layer, on the hidden states of native routing. Memory beyond
    the model: `BATCH_TOKENS` hidden states of every layer (and their residual streams), `CHUNK_NUMBERS` of expert
    outputs, and `[E, n^2]` for CKA.

    Args:
        model: a transformers model.
        layers: its MoE layers.
        sequences_BT: token ids without padding.
        domains: the domain of every sequence; default: one domain named `text`.
        held_B: the sequences that measure what is fitted to the others; default: one in five.
        data: `(file name, sha256)` of the text, for the record.
        seed: of the sample for CKA.
        energy: also measure output norms, gate sums, the norm predictor and EASY-EP's scores by domain.
        collectors: what else to measure, made once a layer; see `carpool.calibrate.capture.Collector`.
        progress: told the tokens of every forward pass.

    Raises:
        CarpoolError: layers of different widths, ids outside the vocabulary, sequences longer than the model's,
            experts that cannot be run one by one in fp32, or outputs that are not finite.
    """
    num_experts, _ = _widths(layers)
    require_fitting(model, sequences_BT)
    total = sequences_BT.numel()
    sample = torch.randperm(total, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:CKA_TOKENS]
    sampled_N = torch.zeros(total, dtype=torch.bool, device="cpu").index_fill(0, sample, True)
    domains = domains or ["text"] * len(sequences_BT)
    names = list(dict.fromkeys(domains))
    if held_B is None:
        held_B = torch.arange(len(sequences_BT), device="cpu") % HELD_OUT == 1
    held_BT = held_B.unsqueeze(1).expand_as(sequences_BT)
    domain_B = torch.tensor([names.index(domain) for domain in domains], device="cpu")
    domain_BT = domain_B.unsqueeze(1).expand_as(sequences_BT)

    runners = [Experts(layer) for layer in layers]
    similarities = [Similarity(num_experts, layer.weight_EH.device) for layer in layers]
    makers: list[MakeCollector] = [Energy.of, lambda layer: EasyEP.of(layer, names)] if energy else []
    collected = [[make(layer) for make in (*makers, *collectors)] for layer in layers]
    samples: list[list[Tensor]] = [[] for _ in layers]
    rows = max(1, BATCH_TOKENS // sequences_BT.shape[1])
    done = 0
    with torch.inference_mode(), calm(model):
        for ids_BT, of_BT, out_BT in zip(*(one.split(rows) for one in (sequences_BT, domain_BT, held_BT)), strict=True):
            facts = of_BT.flatten(), out_BT.flatten()
            picked_N = sampled_N[done : done + ids_BT.numel()]
            for position, routed in enumerate(capture(model, layers, ids_BT)):
                samples[position].append(routed.hidden_NH[picked_N.to(routed.hidden_NH.device)])
                _measure(runners[position], routed, *facts, similarities[position], collected[position])
            done += ids_BT.numel()
            progress(ids_BT.numel())
        results = {
            layer.index: similarity.result() | {"similarity_cka": _cka(runner, torch.cat(hidden)), **_sample(layer)}
            for layer, similarity, runner, hidden in zip(layers, similarities, runners, samples, strict=True)
        }
        for layer, mine in zip(layers, collected, strict=True):
            for collector in mine:
                results[layer.index] |= collector.result()
    everywhere = set.intersection(*(set(tensors) for tensors in results.values()))
    kept = {
        index: {name: tensors[name] for name in tensors if name in everywhere} for index, tensors in results.items()
    }
    width = samples[0][0].shape[-1]
    return signed(model, layers, kept, hidden_size=width, tokens=total, seed=seed, data=data)


def signed(
    model: Any,
    layers: Sequence[Layer],
    measured: Mapping[int, Mapping[str, Tensor]],
    *,
    hidden_size: int,
    tokens: int,
    seed: int,
    data: Sequence[tuple[str, str]],
) -> Statistics:
    """What was measured in every layer, with whose it is and where it is from."""
    return Statistics(
        layers=measured,
        fingerprint=fingerprint((layer.index, layer.weight_EH) for layer in layers),
        architecture=type(model).__name__,
        num_experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        hidden_size=hidden_size,
        tokens=tokens,
        seed=seed,
        data=tuple(data),
        created=now(),
        carpool_version=version(),
        torch_version=torch.__version__,
    )


def require_fitting(model: Any, sequences_BT: Tensor) -> None:
    """Raises CarpoolError if the sequences hold ids that the model does not know, or are too long for it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(sequences_BT.max()) >= vocabulary:
        raise CarpoolError(f"token {int(sequences_BT.max())} is outside the model's vocabulary of {vocabulary}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequences_BT.shape[1] > longest:
        raise CarpoolError(f"sequences of {sequences_BT.shape[1]} tokens exceed the model's {longest}: shorten them")


def _measure(
    experts: Experts,
    routed: Routed,
    domain_N: Tensor,
    held_N: Tensor,
    similarity: Similarity,
    collectors: Sequence[Collector],
) -> None:
    layer, (tokens, hidden_size) = experts.layer, routed.hidden_NH.shape
    rows = max(1, CHUNK_NUMBERS // (layer.num_experts * hidden_size))
    shape = (layer.num_experts, min(rows, tokens), hidden_size)
    buffer_ENH = torch.empty(shape, dtype=torch.float64, device=routed.hidden_NH.device)
    domain_N, held_N = (one.to(routed.hidden_NH.device) for one in (domain_N, held_N))
    with experts.ready() as run:
        for start in range(0, tokens, rows):
            some = slice(start, start + rows)
            hidden_NH, ids_NK, weights_NK = routed.hidden_NH[some], routed.ids_NK[some], routed.weights_NK[some]
            for expert, output_NH in enumerate(experts.each(run, hidden_NH.float())):
                buffer_ENH[expert, : len(hidden_NH)] = output_NH
            outputs_NEH = buffer_ENH[:, : len(hidden_NH)].transpose(0, 1)
            if not similarity.tokens:
                together_NH = run(hidden_NH.float(), ids_NK, weights_NK.float())
                _check_mixture(layer, outputs_NEH, together_NH, ids_NK, weights_NK)
            similarity.update(outputs_NEH, ids_NK, weights_NK)
            residual_NH = None if routed.residual_NH is None else routed.residual_NH[some]
            seen = Seen(hidden_NH, outputs_NEH, ids_NK.long(), weights_NK, residual_NH, domain_N[some], held_N[some])
            for collector in collectors:
                collector.update(seen)
    wrong = (~similarity.gram_EE.diagonal().isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise CarpoolError(f"layer {layer.index}: expert {wrong[0]} gives NaN or inf on this text")


def _check_mixture(layer: Layer, outputs_NEH: Tensor, together_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> None:
    """Refuse experts whose mixture is not the weighted sum of their outputs: they would be measured wrongly."""
    index_NKH = ids_NK.long().unsqueeze(-1).expand(-1, -1, outputs_NEH.shape[-1])
    sum_NH = (outputs_NEH.gather(1, index_NKH) * weights_NK.unsqueeze(-1)).sum(1)
    # with NaN this is false; `_measure` then names the expert
    if (sum_NH - together_NH).norm() > MIXTURE_TOLERANCE * together_NH.norm():
        raise CarpoolError(
            f"layer {layer.index}: {type(layer.experts).__name__} does not mix experts by a weighted sum of their "
            "outputs, so that their similarity cannot be measured one by one"
        )


def _cka(experts: Experts, hidden_NH: Tensor) -> Tensor:
    cka = CKA()
    with experts.ready() as run:
        for output_NH in experts.each(run, hidden_NH.float()):
            cka.add(output_NH)
    return cka.result()


def _sample(layer: Layer) -> Mapping[str, Tensor]:
    found = layer.sample()
    missing = sorted(SAMPLES.keys() - found.tensors.keys())
    if missing:
        raise CarpoolError(
            f"layer {layer.index}: {found.hidden or type(layer.experts).__name__} cannot be sampled, so that nobody "
            "could tell this model's statistics from another's; calibrate the unquantised model"
        )
    return found.tensors


def _widths(layers: Sequence[Layer]) -> tuple[int, int]:
    if not layers:
        raise CarpoolError("the model has no MoE layer: there are no experts to compare")
    widths = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(widths) > 1:
        raise CarpoolError(f"the layers differ in experts and top-k, {sorted(widths)}; only equal layers are supported")
    return widths.pop()
