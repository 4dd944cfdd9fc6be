"""Engines that the plugin refuses, and that it says why in one sentence. No engine is started here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_models as tiny

from carpool import CarpoolError
from carpool.hosts.engine.settings import Settings

tiny.set_environment()
pytest.importorskip("vllm", reason="vLLM is an extra")
POLICY = "xshare(budget=8)"
SHARING = {"policy": POLICY, "isolation": "batch"}


def engine_config(**changes: Any) -> Any:
    parallel = SimpleNamespace(
        enable_expert_parallel=False, data_parallel_size=1, pipeline_parallel_size=1, use_ubatching=False,
        prefill_context_parallel_size=1,
    )  # fmt: skip
    model = SimpleNamespace(is_diffusion=False, runner_type="generate")
    config = SimpleNamespace(
        model_config=model, parallel_config=parallel, use_v2_model_runner=False, kv_transfer_config=None,
        additional_config={"carpool": SHARING},
    )  # fmt: skip
    for name, value in changes.items():
        owner = next((part for part in (parallel, model) if hasattr(part, name)), config)
        setattr(owner, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_expert_parallel": True}, "expert parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"use_ubatching": True}, "micro-batches split the rows"),
        ({"prefill_context_parallel_size": 2}, "context parallelism of prompts"),
        ({"speculative_config": SimpleNamespace(enable_adaptive_verification=True)}, "adaptive verification"),
        ({"additional_config": {"decode_backend": "latency_specialized"}}, "decode_backend='latency_specialized'"),
        ({"kernel_config": SimpleNamespace(monokernel=True)}, "--monokernel decodes a layer by one kernel"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"is_diffusion": True, "use_v2_model_runner": True}, "diffusion models .* needs a GPU"),
        ({"runner_type": "pooling"}, "pooling model .* nothing to share"),
    ],
)
def test_refused_engines(changes: dict[str, Any], message: str) -> None:
    from carpool.hosts.vllm.engine import check_engine

    settings = Settings.of({"carpool": SHARING})
    assert settings is not None
    check_engine(engine_config(), settings)
    with pytest.raises(CarpoolError, match=message):
        check_engine(engine_config(**changes), settings)


@pytest.mark.parametrize("use_v2_model_runner", [False, True])
def test_both_runners_are_taken(use_v2_model_runner: bool) -> None:
    from carpool.hosts.vllm.engine import check_engine

    settings = Settings.of({"carpool": SHARING})
    assert settings is not None
    check_engine(engine_config(use_v2_model_runner=use_v2_model_runner), settings)


def test_the_refused_options_are_vllms() -> None:
    """A renamed option would let them pass."""
    from vllm.config import ParallelConfig
    from vllm.config.speculative import SpeculativeConfig

    assert isinstance(ParallelConfig.use_ubatching, property)
    assert "prefill_context_parallel_size" in ParallelConfig.__dataclass_fields__
    assert "enable_adaptive_verification" in SpeculativeConfig.__dataclass_fields__


def test_adapters_take_no_statistics(tmp_path: Path) -> None:
    from carpool.hosts.vllm.engine import check_engine

    adapted = engine_config(lora_config=object())
    for change in ({}, {"statistics": tmp_path}, {"model": {"num_layers": 4}}):
        settings = Settings.of({"carpool": SHARING})
        assert settings is not None
        settings = replace(settings, policies=replace(settings.policies, **change))
        with pytest.raises(CarpoolError, match=r"adapters .* leave out --enable-lora") if change else nullcontext():
            check_engine(adapted, settings)


def test_pipeline_parallelism_takes_no_statistics(tmp_path: Path) -> None:
    from carpool.hosts.vllm.engine import check_engine

    spread = engine_config(pipeline_parallel_size=2)
    for change in ({}, {"layers": {3: {"budget": 4}}}, {"statistics": tmp_path}, {"model": {"num_layers": 4}}):
        settings = Settings.of({"carpool": SHARING})
        assert settings is not None
        settings = replace(settings, policies=replace(settings.policies, **change))
        check_engine(engine_config(), settings)
        with pytest.raises(CarpoolError, match="no stage sees all layers") if change else nullcontext():
            check_engine(spread, settings)


def test_planes_under_pipeline_parallelism_are_refused_in_a_sentence_of_their_own() -> None:
    from carpool.hosts.vllm.engine import check_engine

    settings, planes = Settings.of({"carpool": SHARING}), {"quant_method": "carpool", "file": "experts.planes"}
    assert settings is not None
    for stages in (1, 2):
        config = engine_config(pipeline_parallel_size=stages)
        config.model_config.hf_config = SimpleNamespace(quantization_config=planes)
        with pytest.raises(CarpoolError, match="checkpoint in planes") if stages > 1 else nullcontext():
            check_engine(config, settings)


def test_a_diffusion_model_is_refused_before_vllm_refuses_it_in_its_own_words() -> None:
    from carpool.hosts.vllm import arm

    class Arguments:
        additional_config: dict[str, Any] = {"carpool": SHARING}

        def create_model_config(self) -> Any:
            return SimpleNamespace(is_diffusion=True, runner_type="generate")

        def create_engine_config(self) -> Any:
            self.create_model_config()
            raise ValueError("Model Runner V1 does not support: diffusion models")

    arm._arm(Arguments, "create_model_config", arm._model_known)
    with pytest.raises(CarpoolError, match=r"needs a GPU .* use `carpool\.share` in transformers"):
        Arguments().create_engine_config()
    Arguments.additional_config = {}
    with pytest.raises(ValueError, match="Model Runner V1"):
        Arguments().create_engine_config()


def test_only_servers_collect_metrics_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` has no /metrics, and counters shared through files would outlive its engines."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    from carpool.hosts.vllm import arm

    collected: list[str] = []
    monkeypatch.setattr("carpool.hosts.vllm.engine.check_engine", lambda *_: None)
    monkeypatch.setattr("carpool.hosts.vllm.metrics.collect_from_workers", lambda: collected.append("metrics"))
    config = SimpleNamespace(additional_config={"carpool": SHARING})
    arm._configured(EngineArgs.__new__(EngineArgs), config)
    assert not collected
    arm._configured(AsyncEngineArgs.__new__(AsyncEngineArgs), config)
    assert collected == ["metrics"]


@pytest.mark.slow
def test_an_impossible_budget_ends_vllms_command_before_weights_load(tmp_path: Path) -> None:
    import json
    import os
    import subprocess
    import sys

    folder = tiny.write_model("qwen3_moe", tmp_path)
    (folder / "model.safetensors").unlink()
    policy = json.dumps({"carpool": SHARING | {"policy": "xshare(budget=999)"}})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--skip-tokenizer-init",
               "--additional-config", policy]  # fmt: skip
    ended = subprocess.run(command, env=os.environ | tiny.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    last = "carpool: budget=999 asks for 999 of 32 experts; use 1 to 32"
    assert ended.stderr.rstrip().splitlines()[-1] == last
    assert "Traceback" not in ended.stderr


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
    for isolation in ("request", "prompt", "tenant", "batch"):
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
        (POLICY, "batch", False), (POLICY, "tenant", False), (POLICY, "prompt", False), (POLICY, "request", True),
        ("topk(k=2)", "batch", True),
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
