"""What is fitted to text is measured on other text: which sequences of a calibration are held out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model, tokens

from carpool import CarpoolError
from carpool.artefacts.texts import Document
from carpool.calibrate import calibrate, token_sequences
from carpool.calibrate.capture import Seen
from carpool.calibrate.sequences import HELD_OUT
from carpool.hosts.transformers import find_layers


class Numbers:
    """A tokenizer of numbers, which are their own ids."""

    bos_token_id, eos_token_id = None, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def told(number: int, count: int) -> str:
    """A text of so many different words of seven digits, the first three of which are the document's number."""
    return " ".join(str((100 + number) * 10_000 + place) for place in range(count))


def words(ids_BT: torch.Tensor) -> set[int]:
    """Whole words: a text may be cut inside one."""
    return {word for word in ids_BT.flatten().tolist() if word >= 1_000_000}


@given(
    lengths=st.lists(st.integers(100, 300), min_size=8, max_size=20),
    domains=st.integers(1, 3),
    again=st.lists(st.integers(0, 7), max_size=10),
    seed=st.integers(0, 3),
)
def test_no_document_is_in_both_parts_however_often_it_comes(
    lengths: list[int], domains: int, again: list[int], seed: int
) -> None:
    texts = [Document(f"d{number % domains}", told(number, length)) for number, length in enumerate(lengths)]
    texts += [Document(texts[number].domain, f" {texts[number].text}\n") for number in again]
    made = token_sequences(texts, Numbers(), 2000, 16, seed, hold_out=True)
    held, kept = made.ids_BT[made.held_B], made.ids_BT[~made.held_B]
    sizes = Counter(text.domain for text in texts[: len(lengths)])
    whole = {domain for domain, size in sizes.items() if size >= HELD_OUT}
    assert not words(held) & words(kept)
    cut = {word // 10_000 for word in words(held)} & {word // 10_000 for word in words(kept)}
    assert not {number for number in cut if f"d{(number - 100) % domains}" in whole}
    assert words(held)
    for domain in set(made.domains):
        mine_B = torch.tensor([one == domain for one in made.domains])
        assert int((made.held_B & mine_B).sum()) <= int(mine_B.sum()) / HELD_OUT + 1


def test_one_document_is_cut() -> None:
    made = token_sequences([Document("a", told(1, 900))], Numbers(), 900, 16, 0, hold_out=True)
    held, kept = words(made.ids_BT[made.held_B]), words(made.ids_BT[~made.held_B])
    assert min(held) > max(kept), "the end of the text"
    with pytest.raises(CarpoolError, match="repeats its beginning"):
        token_sequences([Document("a", " ".join([told(1, 300)] * 5))], Numbers(), 900, 16, 0, hold_out=True)
    with pytest.raises(CarpoolError, match=r"no sequence of 200 tokens to hold out beside 3 others: .*--tokens"):
        token_sequences([Document("a", told(1, 900))], Numbers(), 900, 200, 0, hold_out=True)


def test_without_a_fit_nothing_is_held_out() -> None:
    made = token_sequences([Document("a", told(1, 900))], Numbers(), 900, 16, 0)
    assert not made.held_B.any()
    assert len(words(made.ids_BT)) == 896


class Told:
    """A collector that remembers what it was told to hold out."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def update(self, seen: Seen) -> None:
        self.seen.append(seen)

    def result(self) -> dict[str, torch.Tensor]:
        return {"norm_bias": torch.zeros(8)}


@pytest.mark.parametrize("given_B", [None, torch.arange(16) > 12])
def test_collectors_are_told_whose_tokens_are_held_out(given_B: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carpool.calibrate.run.BATCH_TOKENS", 100)
    model, collectors = tiny_model("qwen3_moe"), [Told(), Told()]
    waiting = list(collectors)
    calibrate(model, find_layers(model), tokens(16, 24), held_B=given_B, collectors=[lambda layer: waiting.pop(0)])
    wanted_B = torch.arange(16) % HELD_OUT == 1 if given_B is None else given_B
    for collector in collectors:
        found_N = torch.cat([seen.held_N for seen in collector.seen])
        assert torch.equal(found_N, wanted_B.repeat_interleave(24))
