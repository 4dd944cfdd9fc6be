"""Text of the model's own that uses its experts evenly: the beam search against a slow one, and what it is for."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.artefacts.texts import load_texts
from carpool.calibrate.capture import calm, capture
from carpool.calibrate.self_sampling import balanced_samples, imbalance, used
from carpool.cli.commands import app
from carpool.hosts.transformers import find_layers


def slow_search(model: Any, first: int, length: int, width: int, temperature: float, begin: list[int]) -> list[int]:
    """All continuations of all beams, each computed anew."""
    layers = find_layers(model)

    def sigma(ids: list[int]) -> float:
        found = []
        for seen in capture(model, layers, torch.tensor([[*begin, *ids]])):
            chosen = seen.ids_NK[len(begin) :].flatten().tolist()
            found.append(statistics.stdev(chosen.count(e) / len(chosen) for e in range(layers[0].num_experts)))
        return statistics.fmean(found)

    def next_log_p(ids: list[int]) -> list[float]:
        logits = model(input_ids=torch.tensor([[*begin, *ids]])).logits[0, -1].double()
        return logits.log_softmax(-1).tolist()

    beams: list[tuple[float, list[int]]] = [(0.0, [first])]
    for _ in range(length - 1):
        tried = []
        for total, ids in beams:
            even = sigma(ids) / temperature
            for token, log_p in enumerate(next_log_p(ids)):
                tried.append((-(total + log_p) / (len(ids) + 1) + even, total + log_p, [*ids, token]))
        beams = [(total, ids) for _, total, ids in sorted(tried, key=lambda one: one[0])[:width]]
    perplexity = [math.exp(-total / length) * math.exp(sigma(ids) / temperature) for total, ids in beams]
    return beams[perplexity.index(min(perplexity))][1]


@pytest.mark.parametrize(("temperature", "begin"), [(1.2, []), (0.05, [1])])
def test_it_is_the_slow_search(temperature: float, begin: list[int]) -> None:
    model = tiny_model("qwen3_moe")
    found = balanced_samples(
        model, find_layers(model), 3, 7, width=3, temperature=temperature, begin=begin, seed=5
    )  # fmt: skip
    assert found.shape == (3, 7)
    with torch.inference_mode(), calm(model):
        for ids in found.tolist():
            assert ids == slow_search(model, ids[0], 7, 3, temperature, begin)


def test_evenness_costs_likelihood_and_pays() -> None:
    model = tiny_model("qwen3_moe")
    layers = find_layers(model)
    even, likely = (
        balanced_samples(model, layers, 24, 16, width=4, temperature=t, seed=1) for t in (0.02, 1e9)
    )  # fmt: skip
    spread = [float(imbalance(used(model, layers, ids).unsqueeze(0))) for ids in (even, likely)]
    assert spread[0] < spread[1]


def test_progress_and_seed() -> None:
    model, told = tiny_model("qwen3_moe"), list[int]()
    layers = find_layers(model)
    one = balanced_samples(model, layers, 2, 5, seed=1, progress=told.append)
    assert sum(told) == one.numel()
    assert torch.equal(one, balanced_samples(model, layers, 2, 5, seed=1))
    assert not torch.equal(one, balanced_samples(model, layers, 2, 5, seed=2))
    with pytest.raises(CarpoolError, match="exceed the model's 128"):
        balanced_samples(model, layers, 1, 129)


@pytest.mark.slow
def test_the_command_writes_text_and_shows_coverage(tmp_path: Path) -> None:
    output = tmp_path / "own.jsonl"
    arguments = ["sample-text", "--tokens", "256", "--sequence", "32", "--beams", "2", "-o", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "imbalance" in result.output
    texts = load_texts([output])
    assert 4 <= len(texts) <= 8


def test_bad_numbers_are_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sample-text", "--beams", "0", "-o", str(tmp_path / "own.jsonl")])
    assert result.exit_code == 2
    assert "--beams 0: give 1 to 64" in result.output
    assert list(tmp_path.iterdir()) == []
