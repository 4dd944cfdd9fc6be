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
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from checkpoint import adapted, export
from corpus import load_config
from denoiser import head_gradients, masked_states, noised
from train import (
    CHECKPOINT_SECONDS,
    balance_loss,
    batch_at,
    build_optimizer,
    learning_rate_factor,
    save_atomically,
)

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

    torch.manual_seed(train["seed"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    streams = {d: np.memmap(work / f"{d}.train.bin", dtype=np.uint16, mode="r") for d in mixture}
    model = adapted(arguments.start)
    captured: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    optimizer = build_optimizer(model, train)

    step_tokens = train["batch"] * train["copies"] * train["sequence"]
    steps = -(-arguments.tokens // step_tokens)
    decay_from = int(steps * (1 - train["decay_fraction"]))
    step = masked = 0
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, masked = state["step"], state["masked"]
        print(f"resumed at step {step}", flush=True)

    def checkpoint(name: str) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "masked": masked}
        save_atomically(state, work / name)

    saved = logged = time.monotonic()
    running: list[float] = []
    bound: list[float] = []
    while step < steps:
        if step == decay_from:
            checkpoint("stable.pt")
        for group in optimizer.param_groups:
            group["lr"] = train["learning_rate"] * learning_rate_factor(step, steps, train)
        clean = batch_at(step, streams, mixture, train)[:, :-1]
        rng = np.random.default_rng((train["seed"], step, 1))
        batch = noised(clean, train["block_sizes"], train["copies"], model.config.mask_token_id, rng)
        captured.clear()
        loss_M, balance = backward(
            model, batch, captured, train["balance" if step < decay_from else "balance_in_decay"]
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        masked += len(loss_M)
        running.append(loss_M.mean().item())
        bound.append((loss_M * batch.weight_BCS[batch.masked_BCS]).sum().item() / batch.masked_BCS.numel())
        if step % LOG_STEPS == 0:
            now = time.monotonic()
            means = f"bound {np.mean(bound):.4f} masked {np.mean(running):.4f} balance {balance:.3f}"
            print(f"step {step}/{steps} {means} {len(bound) * step_tokens / (now - logged):.0f} tok/s", flush=True)
            logged, running, bound = now, [], []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint("last.pt")
            saved = time.monotonic()
    checkpoint("last.pt")
    export(work / "last.pt", arguments.start, work, work / "model")


if __name__ == "__main__":
    main()
