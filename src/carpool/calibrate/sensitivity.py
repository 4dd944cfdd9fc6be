"""How much each MoE layer matters: what leaving its experts out does to the next token (MoDES, arXiv 2511.15690).

One stock forward pass and one a layer, batch by batch. `L` MoE layers, `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carpool.calibrate.capture import Layer, calm
from carpool.calibrate.divergence import divergence, log_probabilities
from carpool.calibrate.run import BATCH_TOKENS, require_fitting
from carpool.errors import CarpoolError

PASS_LOGITS = 1 << 26  # of one forward pass: 256 MiB in fp32


def sensitivity(
    model: Any,
    layers: Sequence[Layer],
    sequences_BT: Tensor,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[int, dict[str, Tensor]]:
    """By layer index `sensitivity_kl []`, the mean KL divergence (nats, over all tokens) of the next token when the
    layer's routed experts add nothing, and `sensitivity []`, its share of the sum over layers.

    Shared experts stay. The published code leaves the block's input in place of its output; here it is zero.

    Args:
        progress: told the tokens of every forward pass that is done, `(1 + L)` times the text's in all.

    Raises:
        CarpoolError: sequences that do not fit the model, experts that were not called, logits that are not finite,
            or a model that no layer's experts matter to.
    """
    require_fitting(model, sequences_BT)
    device, length = layers[0].weight_EH.device, sequences_BT.shape[1]
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, min(BATCH_TOKENS, PASS_LOGITS // vocabulary) // length)
    kl_L = torch.zeros(len(layers), dtype=torch.float64, device="cpu")

    def logits(ids_BT: Tensor) -> Tensor:
        found_RV = model(input_ids=ids_BT.to(device), use_cache=False).logits.flatten(0, 1)
        progress(ids_BT.numel())
        return found_RV

    with torch.inference_mode(), calm(model):
        for ids_BT in sequences_BT.split(rows):
            stock_RV = logits(ids_BT)
            for place, layer in enumerate(layers):
                with without_experts(layer):
                    kl_L[place] += sum(
                        float(divergence(p_CV, q_CV).double().sum())
                        for p_CV, q_CV in log_probabilities(stock_RV, logits(ids_BT))
                    )
    kl_L /= sequences_BT.numel()
    total = float(kl_L.sum())
    if not kl_L.isfinite().all():
        raise CarpoolError("the model gives logits that are not finite; calibrate it in float32 or bfloat16")
    if total <= 0:
        raise CarpoolError("leaving out any layer's experts changes nothing: the experts of this model do not run")
    return {
        layer.index: {"sensitivity": (kl / total).float(), "sensitivity_kl": kl.float()}
        for layer, kl in zip(layers, kl_L, strict=True)
    }


@contextmanager
def without_experts(layer: Layer) -> Iterator[None]:
    """The layer's routed experts add nothing.

    Raises:
        CarpoolError: they were not called inside the block.
    """
    calls = 0

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(output)

    handle = layer.experts.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise CarpoolError(f"layer {layer.index}: its experts were not called: something bypasses this model's routing")
