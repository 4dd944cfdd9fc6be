"""The loop of a training run: learning rate, checkpoints, log; what a step computes is the recipe's own."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

CHECKPOINT_SECONDS = 600
Step = Callable[[int, bool], dict[str, float]]  # of the step's number and whether the rate decays


def prepare(work: Path, mixture: dict, seed: int) -> dict[str, np.ndarray]:
    """The domains' token streams, after seeding and the choice of threads."""
    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return {domain: np.memmap(work / f"{domain}.train.bin", dtype=np.uint16, mode="r") for domain in mixture}


def build_optimizer(model: torch.nn.Module, train: dict) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
        lr=train["learning_rate"], betas=tuple(train["betas"]), fused=True,
    )  # fmt: skip


def learning_rate_factor(step: int, steps: int, train: dict) -> float:
    decay_from = int(steps * (1 - train["decay_fraction"]))
    warm = min(1.0, (step + 1) / train["warmup_steps"])
    return warm if step < decay_from else warm * (steps - step) / (steps - decay_from)


def run(
    model: torch.nn.Module, work: Path, steps: int, train: dict, gradients: Step,
    *, counted: tuple[str, ...] = (), step_tokens: int, log_steps: int = 50,
) -> None:  # fmt: skip
    """Train up to `steps`, from `work / "last.pt"` on if it is there.

    Args:
        gradients: accumulates a step's gradients; returns numbers for the log.
        counted: names of such numbers that the checkpoint keeps the totals of, and the log leaves out.
        step_tokens: tokens of a step.
    """
    optimizer = build_optimizer(model, train)
    decay_from = int(steps * (1 - train["decay_fraction"]))
    step, totals = 0, Counter(dict.fromkeys(counted, 0))
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        totals.update({name: state[name] for name in counted})
        print(f"resumed at step {step}", flush=True)

    def checkpoint(name: str) -> None:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically({**states, "step": step, **totals}, work / name)

    saved = logged = time.monotonic()
    running: list[dict[str, float]] = []
    while step < steps:
        if step == decay_from:
            checkpoint("stable.pt")
        for group in optimizer.param_groups:
            group["lr"] = train["learning_rate"] * learning_rate_factor(step, steps, train)
        numbers = gradients(step, step >= decay_from)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        totals.update({name: int(numbers.pop(name)) for name in counted})
        running.append(numbers)
        if step % log_steps == 0:
            now = time.monotonic()
            means = " ".join(f"{name} {np.mean([row[name] for row in running]):.4f}" for name in numbers)
            print(f"step {step}/{steps} {means} {len(running) * step_tokens / (now - logged):.0f} tok/s", flush=True)
            logged, running = now, []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint("last.pt")
            saved = time.monotonic()
    checkpoint("last.pt")


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
