"""What a user and what a request may write for the plugin, and how settings become knobs; without an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import CarpoolError, parse
from carpool.hosts.engine.knobs import Knobs
from carpool.hosts.engine.request_keys import opted_out, tenant_of
from carpool.hosts.engine.settings import Settings

tiny.set_environment()
pytest.importorskip("vllm", reason="vLLM is an extra")
POLICY = "xshare(budget=8)"


def test_no_key_no_settings() -> None:
    assert Settings.of({}) is None
    assert Settings.of({"other": 1}) is None
    assert Settings.of(None) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("xshare(budget=8)", "give an object"),
        (None, "give an object"),
        ({}, "either 'policy' or 'file'"),
        ({"policy": POLICY, "file": "p.json"}, "either 'policy' or 'file'"),
        ({"policy": 8}, "give a str"),
        ({"policy": ""}, "a policy is a text"),
        ({"policy": "xsahre(budget=8)"}, "unknown policy"),
        ({"policy": "xshare(budget=__import__('os'))"}, "not a literal"),
        ({"policy": POLICY, "budget": 8}, "has no key 'budget'"),
        ({"policy": POLICY, "group": "block:8"}, "group='block:8'; use one of request, prompt, tenant, batch"),
        ({"policy": POLICY}, r'rows of all requests .* write "isolation": "batch"'),
        ({"policy": POLICY, "group": "batch"}, 'write "isolation": "batch"'),
        ({"policy": POLICY, "group": "batch", "isolation": "request"}, 'write "isolation": "batch"'),
        ({"policy": POLICY, "group": "batch", "isolation": "tenant"}, 'write "isolation": "batch"'),
        ({"policy": POLICY, "group": "tenant"}, 'write "isolation": "tenant"'),
        ({"policy": POLICY}, '"group": "prompt" to share among the samples of one request only'),
        ({"policy": POLICY, "group": "tenant", "isolation": "prompt"}, 'write "isolation": "tenant"'),
        ({"policy": POLICY, "group": "prompt", "isolation": "request"}, "rows of a prompt's samples choose .*: write"),
        ({"policy": POLICY, "isolation": "none"}, "use one of request, prompt, tenant, batch"),
        ({"policy": POLICY, "isolation": True}, "give a str"),
        ({"policy": POLICY, "group": "everyone"}, "group='everyone'; use one of request, prompt, tenant, batch"),
        ({"policy": "policy.json"}, "policy='policy.json' names a file; give it as 'file' instead"),
        ({"policy": POLICY, "allow_untested_engine": 1}, "give a bool"),
        ({"file": "/nowhere/policy.json"}, "/nowhere/policy.json"),
        ({"file": "policy.json", "stats": "s.safetensors"}, "names its own statistics"),
    ],
)
def test_malformed_configurations(given: Any, message: str) -> None:
    with pytest.raises(CarpoolError, match=message):
        Settings.of({"carpool": given})


def test_a_policy_file_and_the_defaults_of_serving(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"schema": 1, "policy": "xshare(budget=8)", "layers": {"1": {"budget": 4}}}')
    with pytest.raises(CarpoolError, match='write "isolation": "batch"'):
        Settings.of({"carpool": {"file": str(path)}})
    settings = Settings.of({"carpool": {"file": str(path), "isolation": "batch"}})
    assert settings is not None
    assert str(settings.plan_for(0)) == "xshare(budget=8) | decode_only() | min_batch(2) | short_circuit()"
    assert str(settings.plan_for(1)).startswith("xshare(budget=4)")


@pytest.mark.parametrize(
    ("given", "group"),
    [
        ({"isolation": "batch"}, "batch"), ({"isolation": "tenant"}, "tenant"), ({"isolation": "request"}, "request"),
        ({"isolation": "batch", "group": "tenant"}, "tenant"), ({"group": "request"}, "request"),
        ({"group": "prompt"}, "prompt"), ({"isolation": "prompt"}, "prompt"),
        ({"isolation": "tenant", "group": "prompt"}, "prompt"),
    ],
)  # fmt: skip
def test_the_grouping_follows_the_isolation(given: dict[str, Any], group: str) -> None:
    settings = Settings.of({"carpool": {"policy": POLICY} | given})
    assert settings is not None
    assert str(settings.group) == group


def test_token_local_policies_need_no_acknowledgement() -> None:
    assert Settings.of({"carpool": {"policy": "topk(k=2)"}}) is not None


@pytest.mark.parametrize(
    ("extra", "tenant"),
    [(None, None), ({}, None), ({"carpool_tenant": ""}, None), ({"carpool_tenant": ["a"]}, None),
     ({"carpool_tenant": 1.5}, None), ({"carpool_tenant": True}, None), ({"carpool_tenant": "a"}, (str, "a")),
     ({"carpool_tenant": 7}, (int, 7))],
)  # fmt: skip
def test_tenants(extra: Any, tenant: Any) -> None:
    assert tenant_of(SimpleNamespace(extra_args=extra)) == tenant
    assert tenant_of(None) is None


@pytest.mark.parametrize(
    ("extra", "off"),
    [(None, False), ({}, False), ({"carpool": "on"}, False), ({"carpool": "off"}, True), ({"carpool": 0}, True)],
)
def test_opting_out(extra: Any, off: bool) -> None:
    assert opted_out(SimpleNamespace(extra_args=extra)) == off
    assert not opted_out(None)  # pooling


def test_knobs_carry_shares_and_taus() -> None:
    knobs = Knobs(parse("xshare(budget=0.25) | floor(0.3)").for_serving(), 32, torch.device("cpu"))
    policy: Any = knobs.plan.policy
    assert int(policy.budget) == 8
    other = parse("xshare(budget=0.5, warmup=2) | floor(0.1)").for_serving()
    knobs.check(other)
    knobs.set(other)
    assert int(policy.budget) == 16
    assert int(policy.warmup) == 2
    speculative: Any = Knobs(parse("xshare_speculative(0.5, 0.25)").for_serving(), 32, torch.device("cpu")).plan.policy
    assert (int(speculative.budget), int(speculative.request_budget)) == (16, 8)
    for kind in ("oea(k0=2) | floor(0.1)", "xshare(budget=8)", "xshare(budget=8, utility='squared') | floor(0.1)"):
        with pytest.raises(CarpoolError, match="hold the kind"):
            knobs.check(parse(kind).for_serving())
