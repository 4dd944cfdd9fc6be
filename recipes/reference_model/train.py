"""Train the reference model; resumable, one thread.

    export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    python train.py WORK --tokens 25_000_000

(The two allocator settings keep glibc from returning every activation to the kernel: three times faster.)
`--config config_deepseek.toml` trains the second model, with a WORK of its own that holds the same token streams.

WORK is what `corpus.py` filled. A checkpoint (`WORK/last.pt`) is written every 10 minutes and `WORK/stable.pt`
right before the learning rate decays: to go on with a larger `--tokens` later, copy `stable.pt` to `last.pt`.
The finished model is written to `WORK/model` in transformers' format (bf16).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from corpus import CONFIG, END_OF_TEXT, PAD, load_config
from experts import register
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHECKPOINT_SECONDS = 600
LOSS_ROWS = 512
BIAS = "e_score_correction_bias"
FIXED = {  # by family: what a configuration need not say
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.0},
    "deepseek_v3": {"num_mtp_layers": 0},
}


def build_model(model: dict, vocab_size: int) -> PreTrainedModel:
    family = model.get("model_type", "qwen3_moe")
    given = {name: value for name, value in model.items() if name != "model_type"}
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=1, **FIXED[family], **given
    )
    return AutoModelForCausalLM.from_config(config, experts_implementation=register())


def routers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The routers of the sparse layers, first layer first; they return logits, weights and ids."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def batch_at(step: int, streams: dict[str, np.ndarray], mixture: dict, train: dict) -> torch.Tensor:
    """Rows `[batch, sequence + 1]`; depends on the seed and the step alone, so a resumed run sees the same data."""
    rng = np.random.default_rng((train["seed"], step))
    length = train["sequence"] + 1
    rows = []
    for domain in rng.choice(list(mixture), size=train["batch"], p=np.array(list(mixture.values()))):
        stream = streams[domain]
        start = rng.integers(0, len(stream) - length)
        rows.append(stream[start : start + length].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def build_optimizer(model: PreTrainedModel, train: dict) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
        lr=train["learning_rate"], betas=tuple(train["betas"]), fused=True,
    )  # fmt: skip


def balance_loss(router_logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """Switch-style load balancing (`E * sum_e f_e P_e`), averaged over layers so that every layer is balanced."""
    losses = []
    for logits_NE in router_logits:
        probabilities_NE = logits_NE.float().softmax(-1)
        ids_NK = probabilities_NE.topk(top_k, dim=-1).indices
        share_E = torch.bincount(ids_NK.reshape(-1), minlength=logits_NE.shape[-1]) / ids_NK.numel()
        losses.append(logits_NE.shape[-1] * (share_E * probabilities_NE.mean(0)).sum())
    return torch.stack(losses).mean()


def loads(chosen: list[torch.Tensor], experts: int) -> list[torch.Tensor]:
    """Assignments of every expert over the mean, `[E]` a layer, from the ids that its tokens got."""
    counts = [torch.bincount(ids_NK.flatten(), minlength=experts).float() for ids_NK in chosen]
    return [count_E / count_E.mean() for count_E in counts]


def correct(routers: list[torch.nn.Module], load: list[torch.Tensor], rate: float) -> None:
    """Balancing without a loss (Wang et al., arXiv 2408.15664): what got less than the mean is preferred hereafter."""
    for router, load_E in zip(routers, load, strict=True):
        router.get_buffer(BIAS).add_(rate * (1 - load_E).sign())


def backward(model: PreTrainedModel, tokens: torch.Tensor, routers: list[torch.Tensor], balance: float) -> tuple:
    """Accumulate gradients; the output head runs in chunks, so that the logits of a batch never exist at once.

    Returns:
        mean next-token loss in nats, balance loss (1 is perfectly even)
    """
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    leaf_ND = hidden.detach().flatten(0, 1).requires_grad_()
    total = 0.0
    for rows_CD, targets_C in zip(leaf_ND.split(LOSS_ROWS), tokens[:, 1:].flatten().split(LOSS_ROWS), strict=True):
        loss = cross_entropy(model.lm_head(rows_CD).float(), targets_C, reduction="sum") / leaf_ND.shape[0]
        loss.backward()
        total += loss.item()
    even = balance_loss(routers, model.config.num_experts_per_tok)
    torch.autograd.backward([hidden, even], [leaf_ND.grad.view_as(hidden), torch.tensor(balance)])
    return total, even.item()


def learning_rate_factor(step: int, steps: int, train: dict) -> float:
    decay_from = int(steps * (1 - train["decay_fraction"]))
    warm = min(1.0, (step + 1) / train["warmup_steps"])
    return warm if step < decay_from else warm * (steps - step) / (steps - decay_from)


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def save_model(model: PreTrainedModel, work: Path, folder: Path | None = None, **facts) -> None:
    """Model and tokenizer in transformers' format; the folder is `work / "model"` unless another one is named."""
    folder = folder or work / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PAD
    )
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(BIAS)}
    model.to(torch.bfloat16)
    for name, bias_E in biases.items():  # transformers keeps them in fp32: a bf16 bias would choose other experts
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, bias_E)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=25_000_000)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--bf16", action="store_true", help="autocast; only worth it where the CPU has bf16 GEMMs")
    arguments = parser.parse_args()
    work, config = arguments.work, load_config(arguments.config)
    train, mixture = config["train"], config["mixture"]

    torch.manual_seed(train["seed"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    streams = {d: np.memmap(work / f"{d}.train.bin", dtype=np.uint16, mode="r") for d in mixture}
    model = build_model(config["model"], config["tokenizer"]["vocab_size"])
    captured: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    routers = routers_of(model)
    for router in routers:
        router.register_forward_hook(lambda module, args, output: captured.append(output[0]))
        router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    optimizer = build_optimizer(model, train)

    steps = arguments.tokens // (train["batch"] * train["sequence"])
    decay_from = int(steps * (1 - train["decay_fraction"]))
    step = 0
    if (work / "last.pt").exists():
        state = torch.load(work / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"resumed at step {step}", flush=True)

    def checkpoint(name: str) -> None:
        save_atomically({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, work / name)

    saved = logged = time.monotonic()
    running: list[float] = []
    while step < steps:
        if step == decay_from:
            checkpoint("stable.pt")
        for group in optimizer.param_groups:
            group["lr"] = train["learning_rate"] * learning_rate_factor(step, steps, train)
        tokens = batch_at(step, streams, mixture, train)
        captured.clear()
        chosen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16):
            phase = "" if step < decay_from else "_in_decay"
            loss, balance = backward(model, tokens, captured, train["balance" + phase])
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        load = loads(chosen, routers[0].num_experts)
        if "bias_rate" in train:
            correct(routers, load, train["bias_rate" + phase])
        step += 1
        running.append(loss)
        if step % 50 == 0:
            now = time.monotonic()
            speed = 50 * train["batch"] * train["sequence"] / (now - logged)
            mean = sum(running) / len(running)
            busiest = max(load_E.max().item() for load_E in load)
            even = f"balance {balance:.3f} busiest {busiest:.2f}"
            print(f"step {step}/{steps} loss {mean:.4f} {even} {speed:.0f} tok/s", flush=True)
            logged, running = now, []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint("last.pt")
            saved = time.monotonic()
    checkpoint("last.pt")
    save_model(model, work, tokens=steps * train["batch"] * train["sequence"], steps=steps, config=config)


if __name__ == "__main__":
    main()
