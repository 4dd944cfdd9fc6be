"""Adapt the reference model to block diffusion; resumable, one thread.

    export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    python adapt.py WORK --start MODEL --tokens 8_000_000

WORK holds the token streams and `tokenizer.json` of `../reference_model/corpus.py`, MODEL is the reference model in
transformers' format. `--tokens` counts positions of noisy copies that pass the denoiser, masked or not. A checkpoint
(`WORK/last.pt`) is written every 10 minutes and `WORK/stable.pt` right before the learning rate decays: to go on with a
larger `--tokens` later, copy `stable.pt` to `last.pt`. The finished model is written to `WORK/model` (bf16).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from checkpoint import adapted, export
from corpus import load_config
from denoiser import head_gradients, masked_states, noised
from loop import prepare, run
from train import balance_loss, batch_at

CONFIG = HERE / "config.toml"
LOG_STEPS = 25


def backward(model, batch, routers: list[torch.Tensor], balance: float) -> tuple[torch.Tensor, float]:
    """Accumulate the gradients of the mean of `weight * loss` over all noisy positions, and of the balance loss.

    Returns:
        loss_M of the masked tokens in nats, balance loss (1 is perfectly even)
    """
    states_MH = masked_states(model, batch)
    scale_M = batch.weight_BCS[batch.masked_BCS].to(states_MH.dtype) / batch.masked_BCS.numel()
    targets_M = batch.clean_BS[:, None].expand_as(batch.masked_BCS)[batch.masked_BCS]
    head = model.lm_head.weight
    loss_M, dstates_MH, dweight_VH = head_gradients(head.detach(), states_MH.detach(), targets_M, scale_M)
    head.grad = dweight_VH if head.grad is None else head.grad + dweight_VH
    even = balance_loss(routers, model.config.num_experts_per_tok)
    torch.autograd.backward([states_MH, even], [dstates_MH, torch.tensor(balance, dtype=even.dtype)])
    return loss_M, even.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", type=Path, required=True, help="the reference model's folder")
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=8_000_000)
    arguments = parser.parse_args()
    work, config = arguments.work, load_config(CONFIG)
    train, mixture = config["train"], load_config()["mixture"]

    streams = prepare(work, mixture, train["seed"])
    model = adapted(arguments.start)
    captured: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: captured.append(output[0]))

    def gradients(step: int, decaying: bool) -> dict[str, float]:
        clean = batch_at(step, streams, mixture, train)[:, :-1]
        rng = np.random.default_rng((train["seed"], step, 1))
        batch = noised(clean, train["block_sizes"], train["copies"], model.config.mask_token_id, rng)
        captured.clear()
        loss_M, balance = backward(model, batch, captured, train["balance_in_decay" if decaying else "balance"])
        bound = (loss_M * batch.weight_BCS[batch.masked_BCS]).sum().item() / batch.masked_BCS.numel()
        return {"bound": bound, "loss": loss_M.mean().item(), "balance": balance, "masked": len(loss_M)}

    step_tokens = train["batch"] * train["copies"] * train["sequence"]
    steps = -(-arguments.tokens // step_tokens)
    run(model, work, steps, train, gradients, counted=("masked",), step_tokens=step_tokens, log_steps=LOG_STEPS)
    export(work / "last.pt", arguments.start, work, work / "model")


if __name__ == "__main__":
    main()
