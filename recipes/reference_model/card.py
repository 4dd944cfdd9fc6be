"""Measure the reference model for its card: losses beside baselines, expert load, what experts know of domains.

    export OMP_NUM_THREADS=2
    python card.py WORK CORPUS OUT        # writes OUT/card.json and OUT/card.png

WORK holds the token streams and `model` (see train.py). The exit status is 1 if an expert's load is out of bounds.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from baselines import KneserNey, unigram_loss
from corpus import documents, load_config, overlap, train_lines, write_atomically
from experts import register
from rich.progress import track
from torch.nn.functional import cross_entropy
from train import batch_at

WINDOWS = 240  # of each domain, drawn without replacement; a domain with fewer gives all of them
NGRAM = 5
RESAMPLES = 1000
SHUFFLES = 50
LOAD_BOUNDS = (0.002, 0.08)  # share of a layer's (token, slot) assignments that one expert may get
SEED = 0


@dataclass
class Sample:
    """Held-out windows of one domain: `targets_WT` are positions in the stream, window by window."""

    stream: np.ndarray
    targets_WT: np.ndarray


def sample_windows(stream: np.ndarray, length: int, rng: np.random.Generator) -> Sample:
    """Windows tile the stream, so that no target is scored twice; the first token of a window is context only."""
    starts = np.arange(0, len(stream) - length, length)
    if len(starts) > WINDOWS:
        starts = np.sort(rng.choice(starts, WINDOWS, replace=False))
    return Sample(stream, starts[:, None] + 1 + np.arange(length))


@torch.inference_mode()
def run_model(model, sample: Sample, experts: int, top_k: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns:
    loss_WT in nats, assignments_LWE (how many slots of a window's tokens each expert got)
    """
    routed: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: routed.append(output[0]))
        for layer in model.model.layers
    ]
    losses, assignments = [], []
    for targets_BT in track(np.array_split(sample.targets_WT, max(1, len(sample.targets_WT) // 8)), label):
        tokens = torch.from_numpy(sample.stream.astype(np.int64))
        targets = torch.from_numpy(targets_BT)
        routed.clear()
        logits = model(tokens[targets - 1], use_cache=False).logits
        losses.append(cross_entropy(logits.flatten(0, 1), tokens[targets].flatten(), reduction="none").view_as(targets))
        ids_LBS = torch.stack([logits_NE.topk(top_k).indices.view(len(targets), -1) for logits_NE in routed])
        counts_LBE = ids_LBS.new_zeros(*ids_LBS.shape[:2], experts)
        assignments.append(counts_LBE.scatter_add_(2, ids_LBS, torch.ones_like(ids_LBS)))
    for hook in hooks:
        hook.remove()
    return torch.cat(losses).numpy(), torch.cat(assignments, dim=1).numpy()


def interval(loss_WT: np.ndarray, rng: np.random.Generator) -> list[float]:
    """95 % of the mean loss, resampling whole windows (the tokens of one are not independent)."""
    mean_W = loss_WT.mean(1)
    means = mean_W[rng.integers(0, len(mean_W), (RESAMPLES, len(mean_W)))].mean(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


def domain_counts(assignments_LWE: np.ndarray, domain_W: np.ndarray, domains: int) -> np.ndarray:
    """`[L, D, E]`, every domain's row scaled to sum 1, so that all domains weigh the same."""
    counts_LDE = np.stack([assignments_LWE[:, domain_W == d].sum(1) for d in range(domains)], axis=1).astype(float)
    return counts_LDE / counts_LDE.sum(-1, keepdims=True)


def mutual_information(share_LDE: np.ndarray) -> np.ndarray:
    """I(expert; domain) in bits for each layer, domains equally likely; the most is the log2 of their number."""
    marginal_LE = share_LDE.mean(1, keepdims=True)
    ratio = np.divide(share_LDE, marginal_LE, out=np.ones_like(share_LDE), where=share_LDE > 0)
    return (share_LDE * np.log2(ratio)).sum(-1).mean(1)


def specialisation(assignments_LWE: np.ndarray, domain_W: np.ndarray, domains: int, rng: np.random.Generator) -> dict:
    """Mutual information, and what chance alone gives: the same with the windows' domains shuffled."""
    share_LDE = domain_counts(assignments_LWE, domain_W, domains)
    measured_L = mutual_information(share_LDE)
    null_SL = np.stack(
        [
            mutual_information(domain_counts(assignments_LWE, rng.permutation(domain_W), domains))
            for _ in range(SHUFFLES)
        ]
    )
    return {
        "bits": (measured_L - null_SL.mean(0)).tolist(),
        "bits_before_subtraction": measured_L.tolist(),
        "bits_shuffled_mean": null_SL.mean(0).tolist(),
        "bits_shuffled_max": null_SL.max(0).tolist(),
        "bits_possible": float(np.log2(domains)),
        "share_of_domain": share_LDE.tolist(),
    }


def expert_load(share_LDE: np.ndarray, mixture_D: np.ndarray) -> dict:
    """Share of a layer's assignments that each expert gets on held-out text mixed as in training."""
    load_LE = np.einsum("lde,d->le", share_LDE, mixture_D)
    low, high = LOAD_BOUNDS
    failures = [
        f"layer {layer}, expert {expert}: {load_LE[layer, expert]:.3%}"
        for layer, expert in np.argwhere((load_LE < low) | (load_LE > high))
    ]
    return {
        "bounds": list(LOAD_BOUNDS),
        "least": load_LE.min(1).tolist(),
        "most": load_LE.max(1).tolist(),
        "of_expert": load_LE.tolist(),
        "out_of_bounds": failures,
    }


def measure(work: Path, corpus: Path) -> dict:
    """Everything the card says, as one dictionary that goes to JSON."""
    facts = json.loads((work / "model" / "training.json").read_text())
    config = load_config()
    if facts["config"] != config:
        raise SystemExit(f"{work}/model was trained with another config.toml than this one; check out its version")
    mixture, train, vocabulary = config["mixture"], config["train"], config["tokenizer"]["vocab_size"]
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work / "model", dtype=torch.float32, experts_implementation=register()
    ).eval()

    streams = {d: np.memmap(work / f"{d}.train.bin", dtype=np.uint16, mode="r") for d in mixture}
    rows_RT = np.concatenate(
        [
            batch_at(step, streams, mixture, train).numpy().astype(np.uint16)
            for step in track(range(facts["steps"]), "training rows")
        ]
    )
    ngram = KneserNey(rows_RT, vocabulary, NGRAM)

    domains, assignments, domain_W = {}, [], []
    for index, domain in enumerate(mixture):
        stream = np.fromfile(work / f"{domain}.heldout.bin", dtype=np.uint16)
        sample = sample_windows(stream, train["sequence"], rng)
        loss_WT, counts_LWE = run_model(
            model, sample, model.config.num_experts, model.config.num_experts_per_tok, domain
        )
        assignments.append(counts_LWE)
        domain_W += [index] * len(loss_WT)
        texts = list(documents(corpus, domain, "heldout"))
        characters = sum(map(len, texts))
        scored = sample.targets_WT - 1  # the baselines give no loss for the first token of the stream
        domains[domain] = {
            "heldout_tokens": len(stream),
            "scored_tokens": int(loss_WT.size),
            "characters_per_token": characters / len(stream),
            "lines_also_in_training": overlap(texts, train_lines(corpus, domain)),
            "loss": {
                "model": float(loss_WT.mean()),
                "model_interval": interval(loss_WT, rng),
                "unigram": float(unigram_loss(rows_RT, vocabulary, stream)[scored].mean()),
                "ngram": float(ngram.loss(stream)[scored].mean()),
            },
        }
        domains[domain]["bits_per_character"] = {
            name: domains[domain]["loss"][name] / np.log(2) / domains[domain]["characters_per_token"]
            for name in ("model", "unigram", "ngram")
        }
    special = specialisation(np.concatenate(assignments, 1), np.array(domain_W), len(mixture), rng)
    load = expert_load(np.array(special["share_of_domain"]), np.array(list(mixture.values())))
    return {
        "training": {"tokens": facts["tokens"], "steps": facts["steps"], "seed": train["seed"]},
        "config": config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)},
        },
        "evaluation_seed": SEED,
        "domains": domains,
        "overall": overall(domains),
        "expert_load": load,
        "mutual_information": special,
    }


def overall(domains: dict[str, dict]) -> dict:
    """Token-weighted over the whole held-out streams, in nats per token and bits per character."""
    tokens = np.array([facts["heldout_tokens"] for facts in domains.values()])
    characters = tokens @ [facts["characters_per_token"] for facts in domains.values()]
    names = ("model", "unigram", "ngram")
    nats = {name: float(tokens @ [facts["loss"][name] for facts in domains.values()]) for name in names}
    return {
        "loss": {name: nats[name] / int(tokens.sum()) for name in names},
        "bits_per_character": {name: nats[name] / np.log(2) / characters for name in names},
    }


def write(work: Path, corpus: Path, out: Path) -> dict:
    from picture import draw

    card = measure(work, corpus)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "card.json", json.dumps(rounded(card), indent=1) + "\n")
    draw(card, out / "card.png")
    return card


def rounded(value):
    """Five decimals are more than any of it is exact to, and make the file readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    card = write(arguments.work, arguments.corpus, arguments.out)
    if card["expert_load"]["out_of_bounds"]:
        raise SystemExit("expert load out of bounds: " + "; ".join(card["expert_load"]["out_of_bounds"]))


if __name__ == "__main__":
    main()
