"""Held-out denoising loss of the block-diffusion model, by domain, block size and share of masked tokens.

    export OMP_NUM_THREADS=2
    python heldout.py WORK MODEL REFERENCE OUT.json

WORK holds the token streams, MODEL the block-diffusion model and REFERENCE the model it was adapted from. Beside it:
token frequencies, the reference model's next-token loss (it sees every token before), and the model before adaptation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from baselines import unigram_loss
from card import expert_load, interval, rounded
from checkpoint import adapted
from corpus import load_config, write_atomically
from denoiser import HEAD_ROWS, Noised, masked_states, noised, noised_to
from experts import register
from rich.progress import track
from train import batch_at

WINDOWS = 24  # of each domain
AT_ONCE = 8
SHARES = [0.25, 0.5, 0.75, 1.0]
BOUND_COPIES = 2  # noisy copies with levels as in training, for the bound
UNTRAINED_SHARE = 0.5
SEED = 0


def windows(stream: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """`[W, S]` of a stream, no token twice."""
    tiles = len(stream) // length
    starts = np.sort(rng.choice(tiles, min(WINDOWS, tiles), replace=False)) * length
    return stream[starts[:, None] + np.arange(length)].astype(np.int64)


def losses(model: PreTrainedModel, batch: Noised) -> Tensor:
    """Nats of each masked token `[B, C, S]`, NaN where none is masked."""
    states_MH = masked_states(model, batch)
    targets_M = batch.clean_BS[:, None].expand_as(batch.masked_BCS)[batch.masked_BCS]
    found = [
        cross_entropy(model.lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(states_MH.split(HEAD_ROWS), targets_M.split(HEAD_ROWS), strict=True)
    ]
    loss_BCS = torch.full(batch.masked_BCS.shape, torch.nan)
    loss_BCS[batch.masked_BCS] = torch.cat(found)
    return loss_BCS


@torch.inference_mode()
def denoising(
    model: PreTrainedModel, text_WS: np.ndarray, size: int, shares: list[float], copies: int, label: str
) -> dict[str, np.ndarray]:
    """Mean loss of each window `[W]` at every share of masked tokens; `bound` from so many copies (see `noised`)."""
    rng = np.random.default_rng((SEED, size))
    mask_id = model.config.vocab_size - 1
    found: list[Tensor] = []
    for clean in track(np.split(text_WS, range(AT_ONCE, len(text_WS), AT_ONCE)), label):
        clean_BS = torch.from_numpy(clean)
        losses_BX = losses(model, noised_to(clean_BS, size, shares, mask_id, rng)).nanmean(-1)
        if copies:
            batch = noised(clean_BS, [size], copies, mask_id, rng)
            bound_B = (losses(model, batch).nan_to_num() * batch.weight_BCS).mean((1, 2))
            losses_BX = torch.cat([losses_BX, bound_B[:, None]], dim=1)
        found.append(losses_BX)
    names = [*map(str, shares), *(["bound"] if copies else [])]
    return dict(zip(names, torch.cat(found).numpy().T, strict=True))


@torch.inference_mode()
def next_token(reference: PreTrainedModel, text_WS: np.ndarray) -> np.ndarray:
    """Mean next-token loss of each window `[W]`, but for its first token."""
    found = []
    for clean in np.split(text_WS, range(AT_ONCE, len(text_WS), AT_ONCE)):
        tokens = torch.from_numpy(clean)
        logits = reference(tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        found.append(loss.view(len(tokens), -1).mean(1))
    return torch.cat(found).numpy()


def count_experts(model: PreTrainedModel) -> np.ndarray:
    """Counters `[layers, experts]` of the assignments that the routers make from now on."""
    config = model.config
    counts_LE = np.zeros((config.num_hidden_layers, config.num_experts), dtype=np.int64)
    for index, layer in enumerate(model.model.layers):

        def count(module, args, output, index=index):
            counts_LE[index] += torch.bincount(output[2].flatten(), minlength=config.num_experts).numpy()

        layer.mlp.gate.register_forward_hook(count)
    return counts_LE


def seen_tokens(work: Path, facts: dict, mixture: dict) -> tuple[np.ndarray, int]:
    """Rows of text that training drew, and how many different positions of the streams they cover."""
    train = facts["config"]["train"]
    streams = {d: np.memmap(work / f"{d}.train.bin", dtype=np.uint16, mode="r") for d in mixture}
    ends = np.cumsum([len(stream) for stream in streams.values()])
    places = {d: np.arange(end - len(s), end) for (d, s), end in zip(streams.items(), ends, strict=True)}
    everything = np.concatenate(list(streams.values()))
    drawn_RS = np.concatenate([batch_at(step, places, mixture, train)[:, :-1] for step in range(facts["steps"])])
    return everything[drawn_RS], len(np.unique(drawn_RS))


def measure(work: Path, folder: Path, reference_folder: Path) -> dict:
    facts = json.loads((folder / "training.json").read_text())
    train, mixture = facts["config"]["train"], load_config()["mixture"]
    model, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation=register()).eval()
        for path in (folder, reference_folder)
    )
    before = adapted(reference_folder).eval()
    rows_RS, distinct = seen_tokens(work, facts, mixture)
    counts_LE = count_experts(model)
    rng = np.random.default_rng(SEED)
    domains, share_LDE = {}, []
    for domain in mixture:
        text_WS = windows(np.fromfile(work / f"{domain}.heldout.bin", dtype=np.uint16), train["sequence"], rng)
        counts_LE[:] = 0
        blocks = {}
        for size in train["block_sizes"]:
            loss = denoising(model, text_WS, size, SHARES, BOUND_COPIES, f"{domain}, blocks of {size}")
            blocks[str(size)] = {name: float(loss_W.mean()) for name, loss_W in loss.items()}
            blocks[str(size)]["bound_interval"] = interval(loss["bound"][:, None], rng)
        share_LDE.append(counts_LE / counts_LE.sum(1, keepdims=True))
        size = train["default_block_size"]
        untrained = denoising(before, text_WS, size, [UNTRAINED_SHARE], 0, f"{domain}, before adaptation")
        domains[domain] = {
            "windows": len(text_WS),
            "denoising": blocks,
            "before_adaptation": float(untrained[str(UNTRAINED_SHARE)].mean()),
            "next_token": float(next_token(reference, text_WS).mean()),
            "unigram": float(unigram_loss(rows_RS, model.config.vocab_size, text_WS.ravel()).mean()),
        }
    return {
        "training": {name: value for name, value in facts.items() if name != "config"} | {"distinct_tokens": distinct},
        "config": facts["config"],
        "mixture": mixture,
        "parameters": sum(p.numel() for p in model.parameters()),
        "evaluation_seed": SEED,
        "domains": domains,
        "expert_load": expert_load(np.stack(share_LDE, axis=1), np.array(list(mixture.values()))),
    }


if __name__ == "__main__":
    write_atomically(Path(sys.argv[4]), json.dumps(rounded(measure(*map(Path, sys.argv[1:4]))), indent=1) + "\n")
