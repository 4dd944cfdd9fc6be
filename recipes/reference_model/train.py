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
from pathlib import Path

import numpy as np
import torch
from corpus import CHAT, CONFIG, END_OF_TEXT, PAD, load_config
from experts import register
from loop import prepare, run
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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


def save_model(model: PreTrainedModel, work: Path, folder: Path | None = None, **facts) -> None:
    """Model and tokenizer in transformers' format; the folder is `work / "model"` unless another one is named."""
    folder = folder or work / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PAD
    )
    tokenizer.chat_template = CHAT
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(BIAS)}
    model.to(torch.bfloat16)
    for name, bias_E in biases.items():  # transformers keeps them in fp32: a bf16 bias would choose other experts
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, bias_E)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # one file more would be left out by `package.py`
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

    streams = prepare(work, mixture, train["seed"])
    model = build_model(config["model"], config["tokenizer"]["vocab_size"])
    captured: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    routers = routers_of(model)
    for router in routers:
        router.register_forward_hook(lambda module, args, output: captured.append(output[0]))
        router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))

    def gradients(step: int, decaying: bool) -> dict[str, float]:
        captured.clear()
        chosen.clear()
        phase = "_in_decay" if decaying else ""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16):
            tokens = batch_at(step, streams, mixture, train)
            loss, balance = backward(model, tokens, captured, train["balance" + phase])
        load = loads(chosen, routers[0].num_experts)
        if "bias_rate" in train:
            correct(routers, load, train["bias_rate" + phase])
        return {"loss": loss, "balance": balance, "busiest": max(load_E.max().item() for load_E in load)}

    step_tokens = train["batch"] * train["sequence"]
    steps = arguments.tokens // step_tokens
    run(model, work, steps, train, gradients, step_tokens=step_tokens)
    save_model(model, work, tokens=steps * step_tokens, steps=steps, config=config)


if __name__ == "__main__":
    main()
