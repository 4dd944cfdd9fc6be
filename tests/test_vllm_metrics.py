"""Metrics of the vLLM host: the hot path never waits for the device."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carpool.hosts.vllm import metrics
from carpool.hosts.vllm.metrics import COUNTERS, Metrics
from carpool.plans.counters import FIELDS, Counters, Reading


class Series:
    """In place of Prometheus: one total."""

    def __init__(self) -> None:
        self.total = 0.0

    def inc(self, amount: float) -> None:
        self.total += amount


class Slow(Reading):
    """A copy that takes its time."""

    arrived = False
    waited: Counter[str] = Counter()

    @property
    def ready(self) -> bool:
        return self.arrived

    def report(self) -> Any:
        self.waited["reports"] += 1
        return super().report()


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> dict[str, Series]:
    found = {field: Series() for field in COUNTERS}
    monkeypatch.setattr(metrics, "_metrics", lambda: found)
    monkeypatch.setattr(metrics, "_refusals", lambda: None)
    monkeypatch.setattr(metrics, "bytes_read", lambda *_: {"natural_bytes": 0.0, "read_bytes": 0.0})
    monkeypatch.setattr(metrics, "PERIOD", 0.0)
    return found


def step(counters: Counters) -> None:
    counters.add_measured(0, torch.ones(len(FIELDS), dtype=torch.float64))


def test_a_step_never_waits_for_a_copy(series: dict[str, Series], monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters(["layer"])
    monkeypatch.setattr(counters, "reading", lambda: Slow(counters.layers, counters._totals_LF))
    monkeypatch.setattr(Slow, "waited", Counter())
    published = Metrics(counters, [], publishes=True)
    step(counters)
    published.publish()
    step(counters)
    published.publish()
    assert Slow.waited["reports"] == 0
    assert series["rows"].total == 0
    monkeypatch.setattr(Slow, "arrived", True)
    published.publish()
    assert series["rows"].total == 1  # as it was when the copy began
    published.publish()
    assert series["rows"].total == 2
    monkeypatch.setattr(Slow, "arrived", False)
    step(counters)
    published.publish(now=True)
    assert series["rows"].total == 3


def test_a_copy_from_before_a_reset_is_dropped(series: dict[str, Series], monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters(["layer"])
    monkeypatch.setattr(counters, "reading", lambda: Slow(counters.layers, counters._totals_LF))
    published = Metrics(counters, [], publishes=True)
    step(counters)
    published.publish(now=True)
    step(counters)
    published.publish()
    counters.reset()
    published.forget()
    monkeypatch.setattr(Slow, "arrived", True)
    step(counters)
    published.publish()
    assert series["rows"].total == 2


def test_copies_of_experts_save_nothing() -> None:
    """Under EPLB the bytes read are the most and those of native routing the least that they can be."""
    counters = Counters(["layer"])
    values = dict.fromkeys(FIELDS, 0.0) | {"steps": 3, "natural_union": 40, "union": 24, "surrogates": 10}
    counters.add_measured(0, torch.tensor([values[name] for name in FIELDS], dtype=torch.float64))
    layer: Any = SimpleNamespace(expert_bytes=100, surrogate_bytes=2, replicas=0)
    assert metrics.bytes_read(counters.report(), [layer]) == {"natural_bytes": 4000, "read_bytes": 2420}
    layer.replicas = 4
    assert metrics.bytes_read(counters.report(), [layer]) == {"natural_bytes": 4000, "read_bytes": 3620}
