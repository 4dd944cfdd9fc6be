"""Calibration text in the model's own words that uses its experts evenly (MoEQuant's EBSS, arXiv 2505.03804).

`S` sequences, `W` beams of each, `V` vocabulary, `L` MoE layers, `E` experts, `K` experts per token, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carpool.calibrate.capture import Layer, calm, capture
from carpool.errors import CarpoolError

AT_ONCE = 64  # sequences of one forward pass, each with its beams
BATCH = 16  # sequences of one forward pass that counts


def balanced_samples(
    model: Any,
    layers: Sequence[Layer],
    sequences: int,
    length: int,
    *,
    width: int = 4,
    temperature: float = 1.2,
    begin: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Token ids `[S, T]` by beam search from random first tokens.

    A beam `s` is continued by the token `v` with the least `-(log P(s) + log P(v | s)) / (len(s) + 1) + sigma(s) / t`:
    `sigma` is the imbalance of the experts that the beam has used so far (see `imbalance`). Of a sequence's last beams
    that with the least perplexity times `exp(sigma / t)` is returned.

    Reading of the paper: `sigma` is that of the beam before the token (the text; its Algorithm 1 has the one after it,
    which would take a forward pass for every candidate), and the least scores are kept (it prints the largest).

    Args:
        sequences, length: `S` and `T`; first tokens are drawn evenly from the vocabulary.
        width: `W`. temperature: `t`, the smaller the more evenness counts; the paper's is 1.2.
        begin: ids that every input of the model begins with; not part of what is returned.
        progress: told the tokens that are done.

    Raises:
        CarpoolError: more tokens than the model takes.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and len(begin) + length > longest:
        raise CarpoolError(f"sequences of {length} tokens exceed the model's {longest}: shorten them")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first_S = torch.randint(vocabulary, (sequences,), generator=torch.Generator("cpu").manual_seed(seed))
    found = []
    with torch.inference_mode(), calm(model):
        for some_S in first_S.split(AT_ONCE):
            found.append(_searched(model, layers, some_S, length, width, temperature, list(begin), progress))
    return torch.cat(found)


def imbalance(count_XLE: Tensor) -> Tensor:
    """Mean over layers of the standard deviation of the experts' shares of use, `[X]` for counts `[X, L, E]`."""
    share_XLE = count_XLE.double() / count_XLE.double().sum(-1, keepdim=True).clamp_min(1)
    return share_XLE.std(-1).mean(-1)


def used(model: Any, layers: Sequence[Layer], sequences_BT: Tensor) -> Tensor:
    """How often each expert is used on some text, int64 `[L, E]`."""
    total_LE = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.int64)
    with torch.inference_mode(), calm(model):
        for ids_BT in sequences_BT.split(BATCH):
            for place, seen in enumerate(capture(model, layers, ids_BT)):
                total_LE[place] += seen.ids_NK.flatten().long().cpu().bincount(minlength=total_LE.shape[1])
    return total_LE


class _Counting:
    """While it is entered, what the experts of every row's tokens are in each forward pass."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers, self._seen = layers, dict[int, Tensor]()
        self._handles: list[Any] = []

    def __enter__(self) -> _Counting:
        self._handles = [
            layer.experts.register_forward_pre_hook(self._record(place), with_kwargs=True)
            for place, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, place: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._seen[place] = (*args, *kwargs.values())[1]

        return hook

    def last(self, rows: int) -> Tensor:
        """Uses of each expert in the last position of every row, int64 `[rows, L, E]`."""
        counts = []
        for place, layer in enumerate(self._layers):
            ids_RK = self._seen[place].long().cpu().view(rows, -1, layer.top_k)[:, -1]
            counts.append(torch.zeros(rows, layer.num_experts, dtype=torch.int64).scatter_(-1, ids_RK, 1))
        return torch.stack(counts, 1)


def _searched(
    model: Any, layers: Sequence[Layer], first_S: Tensor, length: int, width: int, temperature: float,
    begin: list[int], progress: Callable[[int], None],
) -> Tensor:  # fmt: skip
    S, device = len(first_S), layers[0].weight_EH.device
    ids_SWT = first_S.view(S, 1, 1).expand(S, width, 1)
    total_SW = torch.zeros(S, width, dtype=torch.float64)
    total_SW[:, 1:] = -torch.inf  # beams begin alike: one of them is continued
    rows_S1 = torch.arange(S).unsqueeze(-1)
    with _Counting(layers) as counting:
        given_RT = torch.tensor(begin, dtype=torch.int64).expand(S * width, -1)
        given_RT = torch.cat([given_RT, ids_SWT.reshape(S * width, 1)], -1)
        output = model(input_ids=given_RT.to(device), use_cache=True, logits_to_keep=1)
        count_SWLE = counting.last(S * width).unflatten(0, (S, width))
        progress(S)
        for done in range(1, length):
            log_p_SWV = output.logits[:, -1].double().log_softmax(-1).cpu().unflatten(0, (S, width))
            best = log_p_SWV.topk(width, -1)
            even_SW1 = imbalance(count_SWLE.flatten(0, 1)).view(S, width, 1) / temperature
            score_SWX = -(total_SW.unsqueeze(-1) + best.values) / (done + 1) + even_SW1
            taken_SW = score_SWX.flatten(1).topk(width, -1, largest=False, sorted=True).indices
            beam_SW = taken_SW // width
            total_SW = total_SW[rows_S1, beam_SW] + best.values.flatten(1).gather(-1, taken_SW)
            next_SW = best.indices.flatten(1).gather(-1, taken_SW)
            ids_SWT = torch.cat([ids_SWT[rows_S1, beam_SW], next_SW.unsqueeze(-1)], -1)
            cache = output.past_key_values
            cache.reorder_cache((rows_S1 * width + beam_SW).flatten().to(device))
            output = model(input_ids=next_SW.reshape(-1, 1).to(device), past_key_values=cache, use_cache=True)
            count_SWLE = count_SWLE[rows_S1, beam_SW] + counting.last(S * width).unflatten(0, (S, width))
            progress(S)
    even_SW = imbalance(count_SWLE.flatten(0, 1)).view(S, width) / temperature
    return ids_SWT[torch.arange(S), (-total_SW / length + even_SW).argmin(-1)]
