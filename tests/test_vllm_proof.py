"""The proof that every layer's policy runs: when it waits for the device, what it asks, and whom it names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from carpool import CarpoolError, parse
from carpool.hosts.engine.layer import Step
from carpool.hosts.engine.metrics import Metrics
from carpool.hosts.engine.proof import WAITED, Proof
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.plans.counters import FIELDS, Counters

ONE_CALL = torch.tensor([float(name == "calls") for name in FIELDS], dtype=torch.float64)


class Engine:
    """Layers that count, all but those in `silent`; `read` is how often somebody waited for the counters."""

    def __init__(self, layers: int = 2, graphs: bool = False, plan: str = "xshare(budget=4)") -> None:
        self.read, self.silent = 0, set[int]()
        names = [f"layer {i}" for i in range(layers)]
        self.counters = Counters(names)
        report = self.counters.report
        self.counters.report = lambda: [setattr(self, "read", self.read + 1), report()][1]  # type: ignore[method-assign]
        self.rows = Rows(16, 8, "batch", torch.device("cpu"))
        made: list[Any] = [
            SimpleNamespace(name=name, position=i, plan=parse(plan).for_serving(), device=torch.device("cpu"),
                            require_added=lambda: None)
            for i, name in enumerate(names)
        ]  # fmt: skip
        self.layers = made
        self.proof = Proof(Step(self.rows, self.counters, graphs), made)

    def step(self, decoding: int, prompt: int = 0) -> None:
        lengths = np.array([1] * decoding + [3] * bool(prompt))
        prefill = np.array([False] * decoding + [True] * bool(prompt))
        self.rows.fill(Requests(lengths, prefill, [None] * len(lengths)), int(lengths.sum()))
        if decoding > 1:
            for layer in self.layers:
                if layer.position not in self.silent:
                    self.counters.add_measured(layer.position, ONE_CALL)
        self.proof.stepped()
        self.rows.clear()


def test_it_waits_for_the_first_steps_of_each_kind_only() -> None:
    engine = Engine()
    for _ in range(WAITED + 2):
        engine.step(3)
    assert engine.read == WAITED
    for _ in range(WAITED + 2):
        engine.step(3, prompt=1)
    assert engine.read == 2 * WAITED
    assert engine.proof.asked == (2 * WAITED + 4,) * 2


def test_a_bypass_of_batches_without_prompts_is_found_after_any_number_of_others() -> None:
    engine = Engine()
    for _ in range(20):
        engine.step(3, prompt=1)
    engine.silent = {1}
    with pytest.raises(CarpoolError, match=r"^layer 1: the engine bypassed the router in 1 of 21 steps"):
        engine.step(3)


def test_steps_in_which_no_policy_may_run_ask_for_nothing() -> None:
    engine = Engine()
    engine.silent = {0, 1}
    engine.step(0, prompt=1)
    engine.step(1)  # fewer than two voters
    assert engine.proof.asked == (0, 0)
    recorded = Engine(graphs=True)  # a graph counts every step in which a row votes
    with pytest.raises(CarpoolError, match="in 1 of 1 steps"):
        recorded.step(1)


def test_many_silent_layers_are_told_in_few_words() -> None:
    engine = Engine(layers=48)
    engine.silent = set(range(1, 48))
    with pytest.raises(CarpoolError, match=r"^layer 1, layer 2, layer 3 and 44 more layers: the engine"):
        engine.step(3)


def test_every_reading_for_the_metrics_is_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.hosts.engine import metrics

    monkeypatch.setattr(metrics, "_metrics", lambda _: {})
    monkeypatch.setattr(metrics, "_refusals", lambda _: None)
    monkeypatch.setattr(metrics, "bytes_read", lambda *_: {})
    engine = Engine()
    published = Metrics(engine.counters, engine.layers, True, engine.proof)
    for _ in range(WAITED):
        engine.step(3)
    published.publish(now=True)
    engine.silent = {0}
    engine.step(3)
    with pytest.raises(CarpoolError, match=r"^layer 0: the engine bypassed the router in 1 of 4 steps"):
        published.publish(now=True)
    engine.counters.reset()
    engine.proof.begin()
    published.publish(now=True)
    assert engine.proof.asked == (0, 0)
