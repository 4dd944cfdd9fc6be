"""Tokenizer and token streams of the reference model.

The corpus is a folder with one sub-folder a domain, each holding `train.jsonl` and `heldout.jsonl`
(one `{"source": ..., "text": ...}` a line). It is read from a path the user gives and never copied.

    python corpus.py CORPUS WORK        # trains WORK/tokenizer.json, writes WORK/<domain>.<split>.bin
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
CONFIG = HERE / "config.toml"
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"  # it learned no roles: text to go on from
TELLING = 30  # characters


def load_config(path: Path = CONFIG) -> dict:
    return tomllib.loads(path.read_text())


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def documents(corpus: Path, domain: str, split: str) -> Iterator[str]:
    with (corpus / domain / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def telling_lines(text: str) -> list[str]:
    """Lines long enough that two files hardly share them by chance."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= TELLING]


def overlap(texts: Iterable[str], known: set[str]) -> float:
    """Share of the telling lines' characters that stand in `known` lines word for word."""
    lengths = [(len(line), line in known) for text in texts for line in telling_lines(text)]
    return sum(length for length, seen in lengths if seen) / max(1, sum(length for length, _ in lengths))


def train_lines(corpus: Path, domain: str) -> set[str]:
    return {line for text in documents(corpus, domain, "train") for line in telling_lines(text)}


def train_tokenizer(corpus: Path, domains: list[str], vocab_size: int, sample_characters: int) -> Tokenizer:
    """Byte-level BPE over an equal number of characters of each domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        for domain in domains:
            left = sample_characters // len(domains)
            for text in documents(corpus, domain, "train"):
                if left <= 0:
                    break
                yield text[:left]
                left -= len(text)

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def encode_split(tokenizer: Tokenizer, corpus: Path, domain: str, split: str) -> np.ndarray:
    """All documents of a split as one uint16 stream, an end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents(corpus, domain, split))):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.array(ids, dtype=np.uint16)


def main(corpus: Path, work: Path) -> None:
    config = load_config()
    domains = list(config["mixture"])
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, domains, **config["tokenizer"])
    tokenizer.save(str(work / "tokenizer.json"))
    for domain in domains:
        for split in ("train", "heldout"):
            stream = encode_split(tokenizer, corpus, domain, split)
            stream.tofile(work / f"{domain}.{split}.bin")
            print(f"{domain}.{split}: {len(stream):,} tokens", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
