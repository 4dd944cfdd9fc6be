"""Statistics of experts inside the real engine: taken where they are of its weights, refused where they are not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_models as tiny
from vllm_statistics import load, statistics

from carpool import CarpoolError
from carpool.artefacts.identity import SAMPLES, differs
from carpool.artefacts.statistics import Statistics
from carpool.hosts.engine.log import log
from carpool.hosts.transformers import find_layers

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm


def engine(folder: Path, stats: Path, **options: Any) -> Any:
    return tiny.engine(folder, {"policy": "sere(top=1)", "isolation": "batch", "stats": str(stats)}, **options)


def negated(folder: Path, target: Path) -> Path:
    """The model with the same routers and other experts."""
    model = load(folder)
    for layer in find_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data.neg_()
    model.save_pretrained(target)
    return target


def test_the_engine_sees_what_transformers_sees(tmp_path: Path) -> None:
    stats = statistics(tiny.qwen3(), tmp_path / "stats.safetensors")
    stored = Statistics.load(stats)
    for dtype in ("float32", "bfloat16"):
        host = tiny.host(engine(tiny.qwen3(), stats, dtype=dtype))
        for layer in host.layers:
            found = layer.runner.routed_experts.carpool_sample
            assert set(found.tensors) == set(SAMPLES)
            assert not any(tensor.isnan().any() for tensor in found.tensors.values())
            assert not differs(stored.layers[layer.index], found)


def test_the_file_of_a_model_with_the_same_routers_is_refused(tmp_path: Path) -> None:
    stats = statistics(tiny.qwen3(), tmp_path / "stats.safetensors")
    other = negated(tiny.qwen3(), tmp_path / "model")
    with pytest.raises(CarpoolError, match=r"another model with the same routers: in layer 0 weights into 32 of its"):
        engine(other, stats)


def test_another_number_of_experts_a_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    replace(Statistics.load(statistics(tiny.qwen3(), path)), top_k=2).save(path)
    with pytest.raises(CarpoolError, match="2 experts a token, the model has 4"):
        engine(tiny.qwen3(), path)


def test_weights_that_are_loaded_later_are_compared_too(tmp_path: Path) -> None:
    """Sharing is off from then on, and can be on again once the right ones are back. (What the CPU build computes after
    a reload is another matter: without the plugin it is not what it was either.)"""
    llm = engine(tiny.qwen3(), statistics(tiny.qwen3(), tmp_path / "stats.safetensors"))

    def changed() -> int:
        llm.collective_rpc("carpool_report", kwargs={"reset": True})
        tiny.generate(llm, tiny.prompts(6))
        [report] = llm.collective_rpc("carpool_report")
        return sum(layer["rows_changed"] for layer in report["layers"])

    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny.qwen3())})
    assert changed() > 0
    other = negated(tiny.qwen3(), tmp_path / "model")
    with pytest.raises(CarpoolError, match=r"other weights were loaded, so sharing stays off: .* the same routers"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert changed() == 0
    for change in ({"enabled": True}, {"policy": "oea(k0=1)"}):
        with pytest.raises(CarpoolError, match="carpool_set: other weights were loaded"):
            llm.collective_rpc("carpool_set", kwargs=change)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny.qwen3())})
    assert changed() > 0
    # some trainers write into the model, past vLLM's own loading: nobody sees which experts these are
    tiny.runner(llm).get_model().load_weights([])
    assert changed() == 0
    assert "could not be compared" in tiny.host(llm).foreign
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny.qwen3())})
    assert changed() > 0
    # a deep sleep discards the weights; until vLLM has loaded some, nothing that was measured applies
    llm.collective_rpc("sleep", args=(1,))
    assert changed() > 0
    llm.collective_rpc("sleep", args=(2,))
    assert changed() == 0
    with pytest.raises(RuntimeError, match="not supported on CPU"):
        llm.collective_rpc("discard", args=(("kv_cache",),))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny.qwen3())})
    assert changed() > 0


def test_sleep_discards_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It discards what was made while the worker loads the weights; our tensors are made after that."""
    from vllm.v1.worker.gpu_worker import Worker

    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.host import Host

    pool, made = list[str](), list[tuple[str, list[str]]]()

    @contextmanager
    def in_pool(tag: str) -> Iterator[None]:
        pool.append(tag)
        yield
        pool.remove(tag)

    runner = SimpleNamespace(load_model=lambda **_: made.append(("weights", [*pool])))
    worker = SimpleNamespace(
        model_runner=runner, vllm_config=SimpleNamespace(weight_transfer_config=None), compile_or_warm_up_model=None,
        _maybe_get_memory_pool_context=in_pool, _scoped_allocator_max_split=lambda **_: nullcontext(),
    )  # fmt: skip
    worker.load_model = MethodType(Worker.load_model, worker)
    monkeypatch.setattr("vllm.v1.worker.gpu_worker.set_current_vllm_config", lambda _: nullcontext())
    monkeypatch.setattr("vllm.v1.worker.gpu_worker.set_torch_threads_for_runtime", lambda: None)
    monkeypatch.setattr(Host, "_finish", lambda self: made.append(("ours", [*pool])))
    settings = Settings.of({"carpool": tiny.SHARING})
    assert settings is not None
    Host.attach(worker, settings)
    worker.load_model()
    assert made == [("weights", ["weights"]), ("ours", [])]


def test_what_was_packed_before_anybody_looked_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here of an engine that was started without statistics."""
    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.layers import build_layers

    stats = statistics(tiny.qwen3(), tmp_path / "stats.safetensors")
    runner = tiny.runner(tiny.shared_engine())
    settings = Settings.of({"carpool": {"policy": "sere(top=1)", "isolation": "batch", "stats": str(stats)}})
    assert settings is not None
    logger = log()
    with caplog.at_level(logging.WARNING, logger.name):
        logger.addHandler(caplog.handler)
        build_layers(runner.get_model(), settings, runner.vllm_config, torch.device("cpu"))
        logger.removeHandler(caplog.handler)
    assert (
        "the experts of 2 of 2 layers could not be compared with the statistics (layer 0: weights that were packed"
        in (caplog.text)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2_moe", "float32"), ("mixtral", "float32"), ("olmoe", "float32"), ("deepseek_v2", "bfloat16"),
        ("deepseek_v3", "bfloat16"), ("gpt_oss", "bfloat16"), ("granitemoe", "float32"), ("glm4_moe", "float32"),
        ("gemma4_text", "float32"), ("cohere2_moe", "float32"),
    ],
)  # fmt: skip
def test_every_family_is_sampled_alike_in_both_hosts(family: str, dtype: str, tmp_path: Path) -> None:
    """Gate and up projection, interleaved and transposed ones, as each host orders them."""
    from carpool.hosts.vllm.expert_samples import sampling, taken

    folder = tiny.write_model(family, tmp_path)
    with sampling():
        llm = tiny.engine(folder, None, dtype=dtype)
    modules = tiny.runner(llm).get_model().modules()
    seen = [taken(module) for module in modules if hasattr(module, "carpool_sample")]
    layers = find_layers(load(folder))
    assert len(seen) == len(layers)
    for layer, found in zip(layers, seen, strict=True):
        assert not any(tensor.isnan().any() for tensor in found.tensors.values())
        assert not differs(layer.sample().tensors, found)
