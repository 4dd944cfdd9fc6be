"""Text that the block-diffusion model writes, and whether it is recognisably of its domain.

    python samples.py WORK MODEL OUT.json

Every sample goes on from the first tokens of a held-out window. A classifier that knows only how often each domain
uses each token (naive Bayes on the training streams) then names the domain of what was written, prompt left out; the
true continuation of the same prompts, and tokens drawn blindly from the mixture, say what its verdict is worth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from carpool.diffusion import Block, Decoding, Forward, Session, generate
from carpool.diffusion.loop import step_by_threshold
from carpool_demo import TEXTS

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from card import rounded
from corpus import load_config, write_atomically

PROMPTS = 16  # of each domain
PROMPT, NEW = 64, 96  # tokens
BLOCK, THRESHOLD = 8, 0.9
TEMPERATURE = 0.7
SEED = 0

Step = Callable[[Session, Block, Decoding], list[Forward]]


def sampled(temperature: float, generator: torch.Generator) -> Step:
    """A decoding step that draws a token for the first masked position, instead of the likeliest for the surest."""

    def step(session: Session, block: Block, decoding: Decoding) -> list[Forward]:
        rows = block.active()
        logits_RLV = session.denoise(block.tokens_AL[rows], rows).to(torch.float32, copy=True)
        logits_RLV[..., decoding.mask_token] = -torch.inf
        probability_RLV = (logits_RLV / temperature).softmax(-1)
        drawn_RL = torch.multinomial(probability_RLV.flatten(0, 1), 1, generator=generator).view(len(rows), -1)
        confidence_RL = probability_RLV.gather(-1, drawn_RL[..., None])[..., 0]
        masked_RL = block.masked_AL[rows]
        first_RL = masked_RL & (masked_RL.cumsum(-1) == 1)
        return [block.accept(rows, drawn_RL, confidence_RL, first_RL)]

    return step


def token_log_shares(work: Path, domains: list[str], vocabulary: int) -> np.ndarray:
    """`[D, V]`: log of how often each domain uses each token, one added to every count."""
    counts = [np.bincount(np.fromfile(work / f"{d}.train.bin", dtype=np.uint16), minlength=vocabulary) for d in domains]
    counts_DV = np.stack(counts) + 1.0
    return np.log(counts_DV / counts_DV.sum(1, keepdims=True))


def recognised(texts: list[list[int]], domain: int, shares_DV: np.ndarray) -> float:
    """Share of the texts whose likeliest domain is this one; a text without any token is not recognised."""
    named = [int(shares_DV[:, text].sum(1).argmax()) if text else -1 for text in texts]
    return float(np.mean([name == domain for name in named]))


def variety(texts: list[list[int]]) -> float:
    """Distinct tokens of a text over its tokens, mean over texts."""
    return float(np.mean([len(set(text)) / len(text) for text in texts if text] or [0.0]))


def written(model: PreTrainedModel, prompts: list[torch.Tensor], step: Step) -> tuple[list[list[int]], float]:
    """Tokens written after each prompt (without an end token), and tokens per forward."""
    decoding = Decoding.of(model, block=BLOCK, threshold=THRESHOLD, max_new=NEW)
    made = generate(Session(model, prompts, BLOCK), prompts, decoding, step=step)
    ends = set(decoding.end_tokens)
    return [[t for t in tokens.tolist() if t not in ends] for tokens in made.tokens], made.tokens_per_forward


def prompt_to_show(domain: str) -> str | None:
    """A document that the demo distribution embeds: other text, or what the model recites of it, is not ours."""
    file = TEXTS / f"{domain}.jsonl"
    return json.loads(file.read_text(encoding="utf-8").splitlines()[0])["text"] if file.is_file() else None


def measure(work: Path, folder: Path) -> dict:
    domains = list(load_config()["mixture"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shares_DV = token_log_shares(work, domains, model.config.vocab_size)
    mixed_V = np.exp(shares_DV).mean(0)
    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    found = {}
    for index, domain in enumerate(domains):
        stream = np.fromfile(work / f"{domain}.heldout.bin", dtype=np.uint16).astype(np.int64)
        starts = rng.choice(len(stream) // (PROMPT + NEW), PROMPTS, replace=False) * (PROMPT + NEW)
        prompts = [torch.from_numpy(stream[start : start + PROMPT]) for start in starts]
        texts = {"true": [stream[start + PROMPT : start + PROMPT + NEW].tolist() for start in starts]}
        speed = {}
        steps = {"greedy": step_by_threshold, "sampled": sampled(TEMPERATURE, generator)}
        for name, step in steps.items():
            texts[name], speed[name] = written(model, prompts, step)
        texts["blind"] = rng.choice(len(mixed_V), (PROMPTS, NEW), p=mixed_V / mixed_V.sum()).tolist()
        found[domain] = {
            "recognised": {name: recognised(many, index, shares_DV) for name, many in texts.items()},
            "variety": {name: variety(many) for name, many in texts.items()},
            "tokens_per_forward": speed,
        }
        document = prompt_to_show(domain)
        if document is not None:
            prompt = tokenizer(document, return_tensors="pt").input_ids[0, :PROMPT]
            after = {name: tokenizer.decode(written(model, [prompt], step)[0][0]) for name, step in steps.items()}
            found[domain]["shown"] = {"prompt": tokenizer.decode(prompt)} | after
        print(domain, json.dumps(found[domain], indent=1, ensure_ascii=False), flush=True)
    settings = {"prompts": PROMPTS, "prompt_tokens": PROMPT, "new_tokens": NEW, "block": BLOCK}
    settings |= {"threshold": THRESHOLD, "temperature": TEMPERATURE, "seed": SEED}
    training = json.loads((folder / "training.json").read_text())
    return {"settings": settings, "training": {"steps": training["steps"]}, "domains": found}


if __name__ == "__main__":
    write_atomically(
        Path(sys.argv[3]), json.dumps(rounded(measure(*map(Path, sys.argv[1:3]))), indent=1, ensure_ascii=False) + "\n"
    )
