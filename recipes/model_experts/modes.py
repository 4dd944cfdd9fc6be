"""Trains one tiny model in two modes on a task whose difficulty is not its length: a fast answer, or step by step.

    python modes.py WORK

The task: the last digit of a sum, `a 3 b 4 c 0 d 9 =`, each term after a letter of its own. Fast (`f` first) the answer
follows at once, slow (`s` first) all partial sums do first, `a3b7c7d6:6`. Many terms are 0 in a third of the sums, so
that there are long easy ones. Writes `WORK/modes` and `WORK/modes.toml`, a pool of both modes of one model.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PLACES = "abcdeghij"  # letters of the terms
LETTERS = ["<pad>", "<end>", *"0123456789=:fs", *PLACES]
PAD, END = 0, 1
SHORTEST, LONGEST = 2, 9  # terms
EASY, ZEROS = 1 / 3, 0.8  # share of easy sums, share of zeros in them
STEPS, BATCH, RATE, WARMUP = 2400, 64, 4e-3, 60
POOL = """# two modes of one model
[[expert]]
name = "fast"
engine = "transformers"
model = "modes"
prompt = "f{question}"
max_tokens = 3
context = 128

[[expert]]
name = "slow"
engine = "transformers"
model = "modes"
prompt = "s{question}"
answer_after = ":"
max_tokens = 30
context = 128
"""


def terms(rng: random.Random) -> list[int]:
    zeros = ZEROS if rng.random() < EASY else 0.0
    return [0 if rng.random() < zeros else rng.randrange(1, 10) for _ in range(rng.randint(SHORTEST, LONGEST))]


def question(numbers: list[int]) -> str:
    return " ".join(f"{place} {number}" for place, number in zip(PLACES, numbers, strict=False)) + " ="


def answer(numbers: list[int], slow: bool) -> str:
    """What follows the question, without the end."""
    last = str(sum(numbers) % 10)
    sums = [f"{PLACES[place]}{sum(numbers[: place + 1]) % 10}" for place in range(len(numbers))]
    return f"{''.join(sums)}:{last}" if slow else last


def made_tokenizer() -> PreTrainedTokenizerFast:
    """One letter a token; spaces are none."""
    tokenizer = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate(LETTERS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def batch(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts `[B, T]`, and which tokens are the model's to write."""
    rows, starts = [], []
    for _ in range(BATCH):
        numbers, slow = terms(rng), rng.random() < 0.5
        put = ("s" if slow else "f") + question(numbers).replace(" ", "")
        rows.append([LETTERS.index(letter) for letter in put + answer(numbers, slow)] + [END])
        starts.append(len(put))
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    place_T = torch.arange(width)
    return ids_BT, (place_T >= torch.tensor(starts)[:, None]) & (ids_BT != PAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    torch.manual_seed(0)
    rng, begun = random.Random(0), time.perf_counter()
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 1 - step / STEPS)
        ids_BT, own_BT = batch(rng)
        logits_BTV = model(ids_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV[own_BT[:, 1:]], ids_BT[:, 1:][own_BT[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{STEPS}, loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    model.save_pretrained(work / "modes")
    made_tokenizer().save_pretrained(work / "modes")
    (work / "modes.toml").write_text(POOL)


if __name__ == "__main__":
    main()
