"""One pass over the text: run every expert on every token and measure how far they stand in for one another.

`B` sequences, `T` tokens each, `N` rows of a batch, `E` experts, `K` experts per token, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from carpool.calibrate.energy import Energy
from carpool.calibrate.similarity import CKA, Similarity
from carpool.errors import CarpoolError
from carpool.stats import Statistics, fingerprint

BATCH_TOKENS = 2048  # tokens of one forward pass of the model
CHUNK_NUMBERS = 1 << 22  # numbers in the expert outputs held at once (32 MB in fp64)
CKA_TOKENS = 512
MIXTURE_TOLERANCE = 1e-2  # relative, between the experts one by one and together


class Layer(Protocol):
    """What calibration needs to know of an MoE layer; `hosts.transformers.MoELayer` has it."""

    @property
    def index(self) -> int: ...
    @property
    def weight_EH(self) -> Tensor: ...
    @property
    def experts(self) -> nn.Module: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...


class Routed(NamedTuple):
    """What one layer's experts were called with."""

    hidden_NH: Tensor
    ids_NK: Tensor
    weights_NK: Tensor


def calibrate(
    model: Any,
    layers: Sequence[Layer],
    sequences_BT: Tensor,
    *,
    data: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    energy: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Statistics of all MoE layers from one pass of the model over the sequences.

    Every expert runs on all tokens in fp32, layer by layer, on the hidden states of native routing. Memory beyond
    the model: `BATCH_TOKENS` hidden states of every layer, `CHUNK_NUMBERS` of expert outputs, and `[E, n^2]` for CKA.

    Args:
        model: a transformers model.
        layers: its MoE layers.
        sequences_BT: token ids without padding.
        data: `(file name, sha256)` of the text, for the record.
        seed: of the sample for CKA.
        energy: also measure output norms, gate sums and the norm predictor (see `carpool.calibrate.energy`).
        progress: told the number of tokens done after each step.

    Raises:
        CarpoolError: layers of different widths, ids outside the vocabulary, sequences longer than the model's,
            experts that cannot be run one by one in fp32, or outputs that are not finite.
    """
    import carpool

    num_experts, top_k = _widths(layers)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(sequences_BT.max()) >= vocabulary:
        raise CarpoolError(f"token {int(sequences_BT.max())} is outside the model's vocabulary of {vocabulary}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequences_BT.shape[1] > longest:
        raise CarpoolError(f"sequences of {sequences_BT.shape[1]} tokens exceed the model's {longest}: shorten them")
    total = sequences_BT.numel()
    sample = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:CKA_TOKENS]
    sampled_N = torch.zeros(total, dtype=torch.bool).index_fill(0, sample, True)

    runners = [Experts(layer) for layer in layers]
    similarities = [Similarity(num_experts, layer.weight_EH.device) for layer in layers]
    energies = [_energy(layer) if energy else None for layer in layers]
    samples: list[list[Tensor]] = [[] for _ in layers]
    rows = max(1, BATCH_TOKENS // sequences_BT.shape[1])
    done = 0
    with torch.inference_mode(), _calm(model):
        for ids_BT in sequences_BT.split(rows):
            picked_N = sampled_N[done : done + ids_BT.numel()]
            for position, routed in enumerate(capture(model, layers, ids_BT)):
                samples[position].append(routed.hidden_NH[picked_N.to(routed.hidden_NH.device)])
                _measure(runners[position], routed, similarities[position], energies[position])
            done += ids_BT.numel()
            progress(done)
        results = {
            layer.index: similarity.result() | {"similarity_cka": _cka(runner, torch.cat(hidden))}
            for layer, similarity, runner, hidden in zip(layers, similarities, runners, samples, strict=True)
        }
        for layer, sums in zip(layers, energies, strict=True):
            results[layer.index] |= sums.result() if sums else {}
    return Statistics(
        layers=results,
        fingerprint=fingerprint((layer.index, layer.weight_EH) for layer in layers),
        architecture=type(model).__name__,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=samples[0][0].shape[-1],
        tokens=total,
        seed=seed,
        data=tuple(data),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        carpool_version=carpool.__version__,
        torch_version=torch.__version__,
    )


class Experts:
    """A layer's experts, run one at a time on all rows in fp32 whatever they are stored in."""

    def __init__(self, layer: Layer) -> None:
        """Raises CarpoolError if the experts are quantised."""
        self.layer = layer
        stored = {p.dtype for p in [*layer.experts.parameters(), *layer.experts.buffers()] if p.dtype != torch.float32}
        if not stored <= {torch.bfloat16, torch.float16, torch.float64}:
            kinds = ", ".join(sorted(map(str, stored)))
            raise CarpoolError(f"layer {layer.index}: experts stored as {kinds}; calibrate the unquantised model")
        self._cast = bool(stored)

    @contextmanager
    def ready(self) -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The experts as a function of fp32 `(hidden_NH, ids_NK, weights_NK)`; cast once for the whole block."""
        module = self.layer.experts
        if not self._cast:
            yield module
            return
        state = {name: tensor.float() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        yield lambda *args: torch.func.functional_call(module, state, args)

    def each(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_NH: Tensor) -> Iterator[Tensor]:
        """Every expert's output `[N, H]` in turn, unweighted."""
        ones_N1 = torch.ones(len(hidden_NH), 1, device=hidden_NH.device)
        for expert in range(self.layer.num_experts):
            output_NH = run(hidden_NH, torch.full_like(ones_N1, expert, dtype=torch.int64), ones_N1)
            yield output_NH


def capture(model: Any, layers: Sequence[Layer], ids_BT: Tensor) -> list[Routed]:
    """Run the model once and return what each layer's experts were called with, in the order of `layers`.

    Raises:
        CarpoolError: a layer's experts were not called exactly once with a row per token.
    """
    calls: list[list[Routed]] = [[] for _ in layers]

    def record(position: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, ids, weights = (*args, *kwargs.values())[:3]
            calls[position].append(Routed(hidden.reshape(-1, hidden.shape[-1]), ids, weights))

        return hook

    handles = [
        layer.experts.register_forward_pre_hook(record(position), with_kwargs=True)
        for position, layer in enumerate(layers)
    ]
    try:
        # the head's logits over the whole vocabulary are not needed
        model.base_model(input_ids=ids_BT.to(layers[0].weight_EH.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer, seen in zip(layers, calls, strict=True):
        shapes = [list(call.ids_NK.shape) for call in seen]
        if shapes != [[ids_BT.numel(), layer.top_k]]:
            raise CarpoolError(
                f"layer {layer.index}: its experts were called with choices of shape {shapes}, not once with "
                f"{[ids_BT.numel(), layer.top_k]}: something bypasses or rewrites this model's routing"
            )
    return [seen[0] for seen in calls]


def _energy(layer: Layer) -> Energy:
    return Energy(layer.num_experts, layer.top_k, layer.weight_EH.shape[1], layer.weight_EH.device)


def _measure(experts: Experts, routed: Routed, similarity: Similarity, energy: Energy | None) -> None:
    layer, (tokens, hidden_size) = experts.layer, routed.hidden_NH.shape
    rows = max(1, CHUNK_NUMBERS // (layer.num_experts * hidden_size))
    shape = (layer.num_experts, min(rows, tokens), hidden_size)
    buffer_ENH = torch.empty(shape, dtype=torch.float64, device=routed.hidden_NH.device)
    with experts.ready() as run:
        for start in range(0, tokens, rows):
            hidden_NH, ids_NK, weights_NK = (tensor[start : start + rows] for tensor in routed)
            for expert, output_NH in enumerate(experts.each(run, hidden_NH.float())):
                buffer_ENH[expert, : len(hidden_NH)] = output_NH
            outputs_NEH = buffer_ENH[:, : len(hidden_NH)].transpose(0, 1)
            if not similarity.tokens:
                together_NH = run(hidden_NH.float(), ids_NK, weights_NK.float())
                _check_mixture(layer, outputs_NEH, together_NH, ids_NK, weights_NK)
            similarity.update(outputs_NEH, ids_NK, weights_NK)
            if energy is not None:
                energy.update(hidden_NH, outputs_NEH, ids_NK, weights_NK)
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


def _widths(layers: Sequence[Layer]) -> tuple[int, int]:
    if not layers:
        raise CarpoolError("the model has no MoE layer: there are no experts to compare")
    widths = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(widths) > 1:
        raise CarpoolError(f"the layers differ in experts and top-k, {sorted(widths)}; only equal layers are supported")
    return widths.pop()


@contextmanager
def _calm(model: Any) -> Iterator[None]:
    """Evaluation mode and the plain expert kernel: others copy an expert's weights for every row."""
    training, switch = model.training, getattr(model, "set_experts_implementation", None)
    before = getattr(model.config, "_experts_implementation", None)
    model.eval()
    try:
        if switch is not None and before is not None:
            switch("eager")
        yield
    finally:
        model.train(training)
        if switch is not None and before is not None:
            switch(before)
