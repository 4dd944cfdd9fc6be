"""Trains a small base model on several domains, and one expert a domain from it; resumable, one thread.

    python train.py CORPUS WORK --tokenizer MODEL

CORPUS is a folder as `../reference_model/README.md` describes, MODEL any folder with a tokenizer (the reference
model's). Writes `WORK/base`, `WORK/<domain>` (transformers' format) and `WORK/pool.toml`; what is there is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from corpus import documents

LOG_STEPS = 50


def stream(corpus: Path, domain: str, characters: int, tokenizer) -> Tensor:
    """Tokens of the first documents of a domain, an end-of-text token after each, int64."""
    ids: list[int] = []
    for text in documents(corpus, domain, "train"):
        if characters <= 0:
            break
        ids += [*tokenizer(text[:characters])["input_ids"], tokenizer.eos_token_id]
        characters -= len(text)
    return torch.tensor(ids)


def batch_at(streams: list[Tensor], step: int, train: dict) -> Tensor:
    """Windows `[B, T + 1]`, the streams in turns; they depend on seed and step alone."""
    generator = torch.Generator().manual_seed(train["seed"] * 1_000_003 + step)
    length, rows = train["sequence"] + 1, []
    for row in range(train["batch"]):
        one = streams[(step * train["batch"] + row) % len(streams)]
        start = int(torch.randint(0, len(one) - length, (), generator=generator))
        rows.append(one[start : start + length])
    return torch.stack(rows)


def fit(model, streams: list[Tensor], tokens: int, rate: float, train: dict, name: str) -> None:
    """AdamW, a short warm-up, then linear to zero."""
    steps = tokens // (train["batch"] * train["sequence"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=train["weight_decay"], betas=(0.9, 0.95))
    begun = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / train["warmup_steps"], 1 - step / steps)
        ids_BT = batch_at(streams, step, train)
        loss = torch.nn.functional.cross_entropy(model(ids_BT[:, :-1]).logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip"])
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps:
            print(
                f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s",
                flush=True,
            )


def save(model, tokenizer, folder: Path) -> None:
    """In one piece: a folder that is there is complete."""
    made = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    made.rename(folder)


def pool(domains: list[str]) -> str:
    experts = [f'[[expert]]\nname = "{name}"\nengine = "transformers"\nmodel = "{name}"\n' for name in domains]
    return "# one expert a domain, fine-tuned from `base`\n" + "\n".join(experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    config = tomllib.loads((HERE / "config.toml").read_text())
    train, work, tokenizer = config["train"], arguments.work, AutoTokenizer.from_pretrained(arguments.tokenizer)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(train["seed"])

    streams = {
        name: stream(arguments.corpus, name, characters, tokenizer) for name, characters in config["domains"].items()
    }
    print({name: len(one) for name, one in streams.items()}, flush=True)
    if not (work / "base").exists():
        ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **config["model"]))
        fit(base, list(streams.values()), train["base_tokens"], train["learning_rate"], train, "base")
        save(base, tokenizer, work / "base")
    for name, one in streams.items():
        if not (work / name).exists():
            expert = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
            fit(expert, [one], train["expert_tokens"], train["expert_learning_rate"], train, name)
            save(expert, tokenizer, work / name)
    (work / "pool.toml").write_text(pool(list(streams)))


if __name__ == "__main__":
    main()
