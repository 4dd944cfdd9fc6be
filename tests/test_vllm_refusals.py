"""What the plugin refuses, and that it says why in one sentence. No engine is started here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import CarpoolError, RouteSpec, parse
from carpool.hosts.vllm.conformance import check
from carpool.hosts.vllm.knobs import Knobs
from carpool.hosts.vllm.rows import opted_out, tenant_of
from carpool.hosts.vllm.settings import Settings
from carpool.hosts.vllm.specs import route_spec

tiny.set_environment()
pytest.importorskip("vllm")
POLICY = "xshare(budget=8)"
SHARING = {"policy": POLICY, "isolation": "batch"}


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
        ({"policy": POLICY, "group": "block:8"}, "no grouping of an engine"),
        ({"policy": POLICY}, r'rows of all requests .* write "isolation": "batch"'),
        ({"policy": POLICY, "group": "batch"}, 'write "isolation": "batch"'),
        ({"policy": POLICY, "group": "batch", "isolation": "request"}, 'write "isolation": "batch"'),
        ({"policy": POLICY, "group": "batch", "isolation": "tenant"}, 'write "isolation": "batch"'),
        ({"policy": POLICY, "group": "tenant"}, 'write "isolation": "tenant"'),
        ({"policy": POLICY, "isolation": "none"}, "use one of request, tenant, batch"),
        ({"policy": POLICY, "isolation": True}, "give a str"),
        ({"policy": POLICY, "group": "everyone"}, "unknown grouping"),
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


def engine_config(**changes: Any) -> Any:
    parallel = SimpleNamespace(enable_expert_parallel=False, data_parallel_size=1)
    config = SimpleNamespace(parallel_config=parallel, use_v2_model_runner=False, kv_transfer_config=None)
    for name, value in changes.items():
        setattr(parallel if hasattr(parallel, name) else config, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_expert_parallel": True}, "expert parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"kv_transfer_config": object()}, "KV connector"),
    ],
)
def test_refused_engines(changes: dict[str, Any], message: str) -> None:
    from carpool.hosts.vllm.engine import check_engine

    settings = Settings.of({"carpool": SHARING})
    assert settings is not None
    check_engine(engine_config(), settings)
    with pytest.raises(CarpoolError, match=message):
        check_engine(engine_config(**changes), settings)


def test_untested_versions_need_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from carpool.hosts.vllm.engine import check_engine

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    strict, brave = (Settings.of({"carpool": SHARING | {"allow_untested_engine": b}}) for b in (False, True))
    assert strict is not None
    assert brave is not None
    with pytest.raises(CarpoolError, match=r"vLLM 0\.99\.1 was not tested"):
        check_engine(engine_config(), strict)
    check_engine(engine_config(), brave)


def test_a_changed_seam_is_refused_whatever_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import layer

    from carpool.hosts.vllm.engine import check_engine

    settings = Settings.of({"carpool": SHARING | {"allow_untested_engine": True}})
    assert settings is not None
    monkeypatch.setattr(layer, "create_fused_moe_router", lambda k: k)
    with pytest.raises(CarpoolError, match="no parameter 'top_k'"):
        check_engine(engine_config(), settings)


def test_batch_invariance_excludes_group_wide_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    from carpool.hosts.vllm.engine import check_engine

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    drafting = engine_config(speculative_config=object())
    for isolation in ("request", "tenant", "batch"):
        group, token = (
            Settings.of({"carpool": {"policy": policy, "isolation": isolation}}) for policy in (POLICY, "topk(k=2)")
        )
        assert group is not None
        assert token is not None
        check_engine(drafting, token)
        for config in (engine_config(), drafting):
            if isolation == "request" and config is not drafting:
                check_engine(config, group)  # a group of a single row does nothing
                continue
            with pytest.raises(CarpoolError, match="VLLM_BATCH_INVARIANT"):
                check_engine(config, group)


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("weight_transfer_config", object()),
        ("aux_output_config", SimpleNamespace(enable_return_routed_experts=True)),
    ],
)
def test_exact_log_probabilities_exclude_sharing_between_requests(mode: str, value: Any) -> None:
    from carpool.hosts.vllm.engine import check_engine

    config = engine_config(**{mode: value})
    for policy, isolation, fits in (
        (POLICY, "batch", False), (POLICY, "tenant", False), (POLICY, "request", True), ("topk(k=2)", "batch", True),
    ):  # fmt: skip
        settings = Settings.of({"carpool": {"policy": policy, "isolation": isolation}})
        assert settings is not None
        if fits:
            check_engine(config, settings)
        else:
            with pytest.raises(CarpoolError, match="log-probabilities that do not depend on the batch"):
                check_engine(config, settings)


def test_the_modes_of_exact_log_probabilities_are_vllms() -> None:
    """A renamed option would let them pass."""
    from vllm.config import VllmConfig
    from vllm.config.aux_output import AuxOutputConfig

    assert "weight_transfer_config" in VllmConfig.__dataclass_fields__
    assert "aux_output_config" in VllmConfig.__dataclass_fields__
    assert "enable_return_routed_experts" in AuxOutputConfig.__dataclass_fields__


@pytest.mark.parametrize(
    ("given", "group"),
    [
        ({"isolation": "batch"}, "batch"), ({"isolation": "tenant"}, "tenant"), ({"isolation": "request"}, "request"),
        ({"isolation": "batch", "group": "tenant"}, "tenant"), ({"group": "request"}, "request"),
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


def router(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "top_k": 4, "scoring_func": "softmax", "renormalize": True, "use_grouped_topk": False, "num_expert_group": None,
        "topk_group": None, "routed_scaling_factor": 1.0, "e_score_correction_bias": None,
        "custom_routing_function": None, "_hash_indices_table": None,
    }  # fmt: skip
    return SimpleNamespace(**(base | changes))


def _external(**_: Any) -> None: ...


_external.__module__ = "vllm.model_executor.models.transformers.moe"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"_hash_indices_table": torch.zeros(1)}, "CPURouter", "hash-routed"),
        ({"custom_routing_function": lambda: None}, "CPURouter", "routing function of the model's own"),
        ({"custom_routing_function": partial(_external)}, "CPURouter", "external routing"),
        ({"e_score_correction_bias": torch.zeros(8)}, "CPURouter", "does not apply the correction bias"),
        ({"scoring_func": "sigmoid"}, "CPURouter", "sigmoid scores without expert groups"),
        ({"routed_scaling_factor": 2.5}, "CPURouter", "scaling factor 2.5"),
        ({"num_fused_shared_experts": 1}, "FusedTopKRouter", "fused shared experts"),
        ({"bias_vl": torch.zeros(8)}, "FusedTopKBiasRouter", "image tokens"),
        ({}, "ZeroExpertRouter", "ZeroExpertRouter"),
        ({}, "RoutingSimulatorRouter", "RoutingSimulatorRouter"),
    ],
)
def test_refused_routers(changes: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(CarpoolError, match=r"layers\.3\.mlp") as caught:
        route_spec(router(**changes), kind, "layers.3.mlp")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"renormalize": False},
        {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
        {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2, "scoring_func": "sigmoid",
         "routed_scaling_factor": 2.5, "e_score_correction_bias": torch.linspace(0, 1, 32)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_the_routers(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """vLLM's own CPU router conforms to the rule read from it, and to no other."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from carpool import Routing

    given = {k.lstrip("_"): v for k, v in vars(router(**changes)).items()}
    real = CPURouter(global_num_experts=32, **given)
    spec = route_spec(real, "CPURouter", "layer")

    def native(logits_NE: torch.Tensor) -> Routing:
        weights_NK, ids_NK = real._compute_routing(logits_NE, logits_NE, None)
        return Routing(ids_NK, weights_NK)

    where = (32, torch.randn(32, 16), dtype, torch.device("cpu"), "layer 7")
    check(spec, native, *where)
    wrong = RouteSpec(**(vars(spec) | {"renormalize": not spec.renormalize}))
    with pytest.raises(CarpoolError, match="layer 7: the router weighs"):
        check(wrong, native, *where)
    with pytest.raises(CarpoolError, match="layer 7: the router picks other experts"):
        check(RouteSpec(**(vars(spec) | {"bias_E": torch.linspace(1, 0, 32)})), native, *where)


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
    for kind in ("oea(k0=2) | floor(0.1)", "xshare(budget=8)", "xshare(budget=8, utility='squared') | floor(0.1)"):
        with pytest.raises(CarpoolError, match="hold the kind"):
            knobs.check(parse(kind).for_serving())


def test_the_kill_switch_arms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from carpool.hosts.vllm import register

    monkeypatch.setattr(WorkerBase, "__init__", getattr(WorkerBase.__init__, "carpool_original", WorkerBase.__init__))
    monkeypatch.setenv("CARPOOL_DISABLE", "1")
    register()
    assert not hasattr(WorkerBase.__init__, "carpool_original")
    monkeypatch.setenv("CARPOOL_DISABLE", "0")
    register()
    assert hasattr(WorkerBase.__init__, "carpool_original")


def test_a_vllm_that_moved_a_constructor_runs_until_it_is_asked_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.hosts.vllm import arm, register

    monkeypatch.setattr(arm, "_missing", [])
    monkeypatch.setattr(arm, "PLACES", (*arm.PLACES, ("vllm.v1.worker.moved", "Worker", "__init__", lambda *_: None)))
    register()
    arm._configured(None, SimpleNamespace(additional_config={}))
    with pytest.raises(CarpoolError, match=r"this vLLM has no vllm\.v1\.worker\.moved\.Worker"):
        arm._configured(None, SimpleNamespace(additional_config={"carpool": SHARING}))
