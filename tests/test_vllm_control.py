"""What `carpool_set` takes and refuses, in one counted sentence, and what the log says of it; without an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from carpool import CarpoolError, RouteSpec
from carpool.hosts.engine.control import Control
from carpool.hosts.engine.fitting import prepare
from carpool.hosts.engine.layer import Layer, Step
from carpool.hosts.engine.log import log
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.hosts.engine.steps import Steps
from carpool.hosts.vllm.host import Host
from carpool.plans.counters import Counters

E, K, H = 32, 4, 16


class Metrics:
    """Counts refusals."""

    publishes = True
    refusals = 0

    def refused(self) -> None:
        self.refusals += 1

    def enabled(self, _: bool) -> None: ...


def control(graphs: bool = False, **given: Any) -> tuple[Control, Any]:
    """Of a host with two layers and no engine around it."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=True), lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )  # fmt: skip
    worker: Any = SimpleNamespace(vllm_config=config, model_runner=SimpleNamespace(get_model=torch.nn.Module))
    settings = Settings.of({"carpool": {"policy": "xshare(budget=8)", "isolation": "batch"} | given})
    assert settings is not None
    host: Any = Host(worker, settings)
    device = torch.device("cpu")
    host.layers = [
        Layer(f"layer {i}", i, None, RouteSpec(K), settings.plan_for(i), E, H, device, position=i) for i in range(2)
    ]
    rows = Rows(16, 8, settings.group.kind, device, settings.isolation)
    host.step, host.steps = Step(rows, Counters(["0", "1"], device), graphs), Steps(rows, host.layers)
    host.metrics, host.weights = Metrics(), SimpleNamespace(foreign="", policies=settings.policies)
    host.use_plans([layer.plan for layer in host.layers], [prepare(one, one.plan) for one in host.layers], False, False)
    return Control(host), host


@pytest.fixture(autouse=True)
def no_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.hosts.vllm import isolation

    monkeypatch.setattr(isolation, "_refuse_batch_invariance", lambda *_: None)  # would import vLLM


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, log().name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == log().name]


@pytest.mark.parametrize(
    ("positional", "given", "message"),
    [
        (("xshare(budget=4)",), {}, "without a name; it takes policy, file, group, enabled"),
        ((), {"polcy": "xshare(budget=4)"}, "carpool_set has no 'polcy'; it takes policy, file"),
        ((), {"budget": 4}, "has no 'budget'"),
        ((), {"policy": 4}, "policy=4; give a text"),
        ((), {"policy": ["xshare"]}, "give a text"),
        ((), {"file": True}, "give a text"),
        ((), {"group": 1}, "give a text"),
        ((), {"enabled": "no"}, "give true or false"),
        ((), {"compile": 1}, "give true or false"),
        ((), {"policy": "xshare(budget=4)", "file": "p.json"}, "either policy or file"),
        ((), {"policy": "xshare(budget=999)"}, "999 of 32 experts"),
        ((), {"policy": ""}, "a policy is a text"),
        ((), {"file": "/nowhere/policy.json"}, "/nowhere/policy.json"),
        ((), {"group": "everyone"}, "group='everyone'; use one of request, prompt, tenant, batch"),
        ((), {"policy": "policy.json"}, "names a file; give it as 'file' instead"),
        ((), {"group": "block:8"}, "group='block:8'; use one of request, prompt, tenant, batch"),
    ],
)
def test_refused_in_one_counted_sentence(said: Any, positional: Any, given: dict[str, Any], message: str) -> None:
    asked, host = control()
    before = asked.set()
    with pytest.raises(CarpoolError, match=message) as caught:
        asked.set(*positional, **given)
    assert "\n" not in str(caught.value)
    assert len(caught.traceback) == 2, "vLLM logs it: the way to the refusal is nobody's business"
    assert host.metrics.refusals == 1
    assert said() == [f"carpool refuses a change: {caught.value}"]
    assert asked.set() == before


def test_a_change_is_one_line(said: Any) -> None:
    asked, _ = control()
    asked.set(policy="xshare(budget=4)")
    asked.set(enabled=False)
    asked.set()  # asks only
    first, second = said()
    for part in ("changes: on, xshare(budget=4) | decode_only()", "in 2 layers of 32 experts, 4 a token", "group batch",
                 "isolation batch", "statistics none", "operation by operation"):  # fmt: skip
        assert part in first
    assert "changes: off (native routing)" in second


def test_the_way_back_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text('{"schema": 1, "policy": "xshare(budget=8)", "layers": {"1": {"budget": 5}}}')
    asked, host = control()
    assert asked.set(file=str(path))["policy"] == "set per layer"
    assert [str(layer.plan).split(" ")[0] for layer in host.layers] == ["xshare(budget=8)", "xshare(budget=5)"]
    assert asked.set(policy="oea(k0=2)")["policy"].startswith("oea(k0=2)")
    assert asked.set(file=str(path))["policy"] == "set per layer"
    path.write_text('{"schema": 1, "policy": "xshare(budget=8)", "layers": {"7": {"budget": 5}}}')
    with pytest.raises(CarpoolError, match="sets layer 7"):
        asked.set(file=str(path))
    assert host.weights.policies.layers == {1: {"budget": 5}}


def test_groups_within_the_isolation(said: Any) -> None:
    asked, host = control()
    lone = Requests(np.ones(3, np.int64), np.zeros(3, bool), [None] * 3)
    for group, numbers in (("request", [0, 1, 2]), ("batch", [0, 0, 0]), ("tenant", [0, 1, 2])):
        assert asked.set(group=group)["group"] == group
        host.step.rows.fill(lone, 3)
        batch = host.step.rows.batch(3)
        assert batch.group_N.tolist() == numbers
        assert batch.num_groups == (1 if group == "batch" else 3)
    assert len(said()) == 3
    narrow, host = control(isolation="tenant")
    assert narrow.set(group="prompt")["group"] == "prompt"
    assert narrow.set(group="tenant", policy="oea(k0=2)")["group"] == "tenant"
    with pytest.raises(CarpoolError, match='write "isolation": "batch"'):
        narrow.set(group="batch")
    assert str(host.settings.group) == host.step.rows.group == "tenant"


def test_recorded_graphs_hold_the_grouping() -> None:
    asked, host = control(graphs=True)
    with pytest.raises(CarpoolError, match=r"CUDA graphs hold the grouping \(batch\)"):
        asked.set(group="request")
    assert asked.set(group="batch", policy="xshare(budget=4)")["group"] == "batch"
    assert host.metrics.refusals == 1


def test_before_the_model_is_there() -> None:
    worker: Any = SimpleNamespace()
    settings = Settings.of({"carpool": {"policy": "topk(k=2)"}})
    assert settings is not None
    with pytest.raises(CarpoolError, match="not loaded yet"):
        Control(Host(worker, settings)).set(policy="topk(k=1)")
