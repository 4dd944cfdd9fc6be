"""Metrics of the vLLM host: the hot path never waits for the device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carpool.hosts.engine import metrics
from carpool.hosts.engine.layer import Experts
from carpool.hosts.engine.metrics import COUNTERS, Metrics
from carpool.hosts.vllm.metrics import collect_from_workers, labels_of
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
    monkeypatch.setattr(metrics, "_metrics", lambda _: found)
    monkeypatch.setattr(metrics, "_refusals", lambda _: None)
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
    values = dict.fromkeys(FIELDS, 0.0) | {
        "steps": 3,
        "natural_union": 40,
        "union": 24,
        "surrogates": 10,
        "bits_unread": 7,
    }
    counters.add_measured(0, torch.tensor([values[name] for name in FIELDS], dtype=torch.float64))
    layer: Any = SimpleNamespace(experts=Experts(bytes=100), surrogate_bytes=2)
    assert metrics.bytes_read(counters.report(), [layer]) == {"natural_bytes": 4000, "read_bytes": 2420}
    layer.experts = Experts(bytes=100, bit_bytes=1)
    assert metrics.bytes_read(counters.report(), [layer])["read_bytes"] == 2420 - 7
    layer.experts = Experts(bytes=100, replicas=4)
    assert metrics.bytes_read(counters.report(), [layer]) == {"natural_bytes": 4000, "read_bytes": 3620}


def test_labels_are_vllms_own() -> None:
    """As `PrometheusStatLogger` gives them, so that ours can be joined with them."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="served"), parallel_config=SimpleNamespace(data_parallel_rank=0)
    )
    assert labels_of(config) == ("served", "0")
    metrics._enabled(labels_of(config)).set(1)
    metrics._refusals(labels_of(config)).inc()
    from prometheus_client import REGISTRY

    labels = {"model_name": "served", "engine": "0"}
    assert REGISTRY.get_sample_value("carpool_enabled", labels) == 1
    assert REGISTRY.get_sample_value("carpool_refusals_total", labels) == 1
    assert {*metrics._metrics(labels_of(config))} == {*COUNTERS}


def test_the_labels_names_are_vllms() -> None:
    """A renamed label would part them."""
    pytest.importorskip("vllm", reason="vLLM is an extra")
    import inspect

    from vllm.v1.metrics.loggers import PrometheusStatLogger

    assert 'labelnames = ["model_name", "engine"]' in inspect.getsource(PrometheusStatLogger.__init__)


ENDING = """
import os
from carpool.hosts.vllm.metrics import collect_from_workers
collect_from_workers()
from prometheus_client import Counter
from vllm.v1.metrics.prometheus import get_prometheus_registry, shutdown_prometheus
Counter("seen", "x", ["model_name"]).labels("m").inc()
assert get_prometheus_registry().get_sample_value("seen_total", {"model_name": "m"}) == 1
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
assert os.listdir(folder)
shutdown_prometheus()
print(folder)
"""


def test_the_shared_folder_is_not_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM does at the end fails on a folder that it made itself."""
    prometheus = pytest.importorskip("vllm.v1.metrics.prometheus", reason="vLLM is an extra")
    from prometheus_client import values

    name = "PROMETHEUS_MULTIPROC_DIR"
    monkeypatch.setenv(name, "")  # so that it is gone afterwards
    monkeypatch.delenv(name)
    envs = pytest.importorskip("vllm.envs")
    monkeypatch.setitem(vars(envs), "VLLM_ENABLE_V1_MULTIPROCESSING", True)  # vLLM may have read and kept it
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    collect_from_workers()
    assert Path(os.environ[name]).is_dir()
    assert prometheus._prometheus_multiproc_dir is None


@pytest.mark.slow
def test_a_server_ends_without_an_error_and_leaves_no_folder() -> None:
    """vLLM gives Prometheus an object in place of the folder's path."""
    pytest.importorskip("vllm", reason="vLLM is an extra")
    environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    environment |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ended = subprocess.run([sys.executable, "-c", ENDING], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout + ended.stderr
    assert "cleanup" not in said
    assert "set by user" not in said
    assert not Path(ended.stdout.strip().splitlines()[-1]).exists()
