"""A tiny model, a word-number tokenizer and texts for the tests of lockstep evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tiny_models import tiny_model

from carpool.hosts.transformers import find_layers

VOCABULARY = 64


@dataclass(frozen=True)
class Document:
    domain: str
    text: str


class NumberTokenizer:
    """Every word of a text is a number, its token id."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def numbers(domain: str, length: int, start: int = 0) -> Document:
    """A text that counts, so that a window of it tells where it came from."""
    return Document(domain, " ".join(str(start + index) for index in range(length)))


def noise(domain: str, length: int, seed: int) -> Document:
    ids = np.random.default_rng(seed).integers(2, VOCABULARY, size=length)
    return Document(domain, " ".join(map(str, ids)))


def small_model() -> Any:
    """Two layers with enough experts that a batch of four leaves some unread."""
    return tiny_model("qwen3_moe", vocab_size=VOCABULARY)


def write_texts(folder: Path) -> list[Path]:
    paths = []
    for seed, domain in enumerate(("code", "prose")):
        path = folder / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"text": noise(domain, 60, seed * 100 + i).text}) + "\n" for i in range(12)))
        paths.append(path)
    return paths


def opening(model: Any, tokenizer: Any, *, without_weights: bool = False) -> Any:
    """What stands in for `open_model`: a model that is there already, or one whose weights must not be asked for."""

    def weights(*given: Any, **named: Any) -> Any:
        assert not without_weights, "the weights were read"
        return model

    def open_model(path: Any = None, *, check: Any = lambda layers: None) -> SimpleNamespace:
        layers = find_layers(model)
        check(layers)
        return SimpleNamespace(layers=layers, tokenizer=tokenizer, weights=weights, planes=None, in_planes=False)

    return open_model
