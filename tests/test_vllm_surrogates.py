"""Surrogates inside the real engine: beside the experts, once, on the right side of what comes after them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny
from vllm_statistics import RANK, load, statistics

import carpool
from carpool import CarpoolError, parse
from carpool.artefacts.statistics import Statistics
from carpool.hosts.transformers import find_layers, fingerprint
from carpool.plans.policy_file import PolicyFile

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
POLICY = f"surrogate(budget={tiny.BUDGET})"


@functools.cache
def shipped() -> Path:
    """Statistics of the model that the tests share."""
    return statistics(tiny.qwen3(), Path(tempfile.mkdtemp(prefix="carpool-stats-")) / "stats.safetensors")


@functools.cache
def sharing() -> dict[str, Any]:
    return {"policy": POLICY, "isolation": "batch", "stats": str(shipped())}


@functools.cache
def engine() -> Any:
    return tiny.engine(tiny.qwen3(), sharing())


@pytest.fixture
def shared() -> Iterator[Any]:
    """The engine as it was when it started."""
    llm = engine()
    yield llm
    tiny.host(llm).step.observer = None
    llm.collective_rpc("carpool_set", kwargs={"policy": POLICY, "enabled": True})
    llm.collective_rpc("carpool_report", kwargs={"reset": True})


def compare_with_transformers(llm: Any, folder: Path, stats: Path, **request: Any) -> int:
    """Run every decode step's blocks again in transformers, on the same hidden states; how many pairs were foreseen.

    Fails unless experts and surrogates are the same and the blocks' outputs differ by rounding only.
    """
    from vllm import SamplingParams

    host, blocks = tiny.host(llm), list[tuple[torch.Tensor, torch.Tensor]]()
    modules = dict(tiny.runner(llm).get_model().named_modules())
    handles = [
        modules[layer.name.rpartition(".")[0]].register_forward_hook(
            lambda module, args, output: blocks.append((args[0].clone(), output.clone()))
        )
        for layer in host.layers
    ]
    calls = tiny.watch(llm)
    common: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "detokenize": False, "ignore_eos": True}
    given = [SamplingParams(**common, **(request if i % 2 else {})) for i in range(6)]
    try:
        llm.generate([{"prompt_token_ids": ids} for ids in tiny.prompts(6, seed=5)], given, use_tqdm=False)
    finally:
        for handle in handles:
            handle.remove()
    blocks = [block for block in blocks if len(block[0]) == 6]  # the decode steps; the prompts come as 36 rows
    assert len(blocks) == len(calls) == 3 * len(host.layers)
    model, seen, pairs = load(folder), dict[int, Any](), 0
    layers = find_layers(model)
    plan = PolicyFile(host.layers[0].plan, {})
    with (
        torch.no_grad(),
        carpool.share(model, plan, stats=stats, observe=lambda place, batch, outcome: seen.__setitem__(place, outcome))
        as run,
    ):  # fmt: skip
        for call, (hidden_NH, output_NH) in zip(calls, blocks, strict=True):
            run.batch = call.batch
            place = call.layer.position
            again = layers[place].block(hidden_NH.unsqueeze(0))
            again = again[0] if isinstance(again, tuple) else again
            mine, theirs = call.outcome.routing, seen[place].routing
            assert torch.equal(mine.ids_NK.sort(-1).values, theirs.ids_NK.sort(-1).values)
            later = call.layer.runner.routed_scaling_factor  # which vLLM applies to the experts' output
            found_NE, wanted_NE = (
                torch.zeros(6, tiny.EXPERTS).scatter_add(-1, r.surrogate_ids_NK.long(), r.surrogate_weights_NK.float())
                for r in (mine, theirs)
            )
            torch.testing.assert_close(found_NE * later, wanted_NE, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(output_NH, again.reshape(output_NH.shape), rtol=1e-3, atol=1e-4)
            pairs += int((mine.surrogate_weights_NK != 0).sum())
    return pairs


def test_blocks_give_what_they_give_in_transformers(shared: Any) -> None:
    assert compare_with_transformers(shared, tiny.qwen3(), shipped()) > 20


def test_beside_requests_that_opted_out(shared: Any) -> None:
    """What they read is free for the others, so little is left to surrogates."""
    shared.collective_rpc("carpool_set", kwargs={"policy": "surrogate(budget=1)"})
    assert compare_with_transformers(shared, tiny.qwen3(), shipped(), extra_args={"carpool": "off"}) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [("qwen2_moe", {}), ("olmoe", {}), ("mixtral", {}), ("glm4_moe", {"routed_scaling_factor": 2.5})],
)
def test_shared_experts_and_scaling_come_after(
    family: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.FAMILIES, family, tiny.FAMILIES[family] | more)
    folder = tiny.write_model(family, tmp_path / "model")
    stats = statistics(folder, tmp_path / "stats.safetensors")
    llm = tiny.engine(folder, {"policy": POLICY, "isolation": "batch", "stats": str(stats)})
    assert compare_with_transformers(llm, folder, stats) > 20


def test_within_the_budget_off_and_on(shared: Any) -> None:
    stock, given = tiny.stock_engine(), tiny.prompts(6, seed=4)
    native = tiny.generate(stock, given)
    calls = tiny.watch(shared)
    before = tiny.generate(shared, given)
    tiny.assert_bounded(calls, tiny.BUDGET)
    tiny.host(shared).step.observer = None
    shared.collective_rpc("carpool_set", kwargs={"enabled": False})
    assert tiny.generate(shared, given) == native
    shared.collective_rpc("carpool_set", kwargs={"enabled": True})
    assert tiny.generate(shared, given) == before != native
    shared.collective_rpc("carpool_set", kwargs={"policy": "surrogate(1.0)"})  # its identity setting
    assert tiny.generate(shared, given) == native
    shared.collective_rpc("carpool_set", kwargs={"policy": f"surrogate({tiny.BUDGET}, least=2)"})  # backfill only
    assert tiny.generate(shared, given) not in (native, before)


def test_other_policies_with_the_same_statistics_leave_nothing(shared: Any) -> None:
    shared.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY})
    given = tiny.prompts(6, seed=6)
    assert tiny.generate(shared, given) == tiny.generate(tiny.shared_engine(), given)
    [report] = shared.collective_rpc("carpool_report")
    assert {layer["surrogates"] for layer in report["layers"]} == {0}
    assert {layer.left for layer in tiny.host(shared).layers} == {None}


def test_what_is_counted(shared: Any) -> None:
    from prometheus_client import REGISTRY

    def counted(name: str) -> float:
        labels = {"model_name": str(shared.llm_engine.vllm_config.model_config.served_model_name), "engine": "0"}
        return REGISTRY.get_sample_value(f"carpool_{name}_total", labels) or 0.0

    names = ("surrogates_read", "surrogate_pairs", "read_bytes", "natural_bytes")
    shared.collective_rpc("carpool_report", kwargs={"reset": True})
    before = [counted(name) for name in names]
    calls = tiny.watch(shared)
    tiny.generate(shared, tiny.prompts(6, seed=7), tokens=5)
    [report] = shared.collective_rpc("carpool_report", kwargs={"reset": True})
    read, pairs, read_bytes, natural_bytes = (counted(name) - old for name, old in zip(names, before, strict=True))
    H, width = tiny.SIZES["hidden_size"], tiny.FAMILIES["qwen3_moe"]["moe_intermediate_size"]
    expert, surrogate = 3 * H * width * 4, (2 * RANK + 1) * (H + 4)
    used = union = natural = found = 0
    for call in calls:
        ids_NK, weights_NK = (call.outcome.routing.surrogate_ids_NK, call.outcome.routing.surrogate_weights_NK)
        used += len(ids_NK[weights_NK != 0].unique())
        found += int((weights_NK != 0).sum())
        union += len(call.outcome.routing.ids_NK.unique())
        natural += len(call.outcome.inputs.native_ids_NK.unique())
    assert (read, pairs) == (used, found)
    assert used > 0
    assert read_bytes == union * expert + used * surrogate
    assert natural_bytes == natural * expert
    assert sum(layer["surrogates"] for layer in report["layers"]) == used
    assert {(layer["expert_bytes"], layer["surrogate_bytes"]) for layer in report["layers"]} == {(expert, surrogate)}
    assert report["surrogate_memory"] == 2 * tiny.EXPERTS * surrogate


def test_a_policy_file_with_budgets_of_its_layers(tmp_path: Path) -> None:
    path, budgets = tmp_path / "policy.json", {0: 6, 1: 12}
    local = tmp_path / "stats.safetensors"
    local.write_bytes(shipped().read_bytes())
    PolicyFile(
        parse("surrogate(budget=20)"), {index: {"budget": size} for index, size in budgets.items()},
        {"fingerprint": fingerprint(load(tiny.qwen3())), "num_layers": 2, "num_experts": tiny.EXPERTS}, local,
    ).save(path)  # fmt: skip
    llm = tiny.engine(tiny.qwen3(), {"file": str(path), "isolation": "batch"})
    calls = tiny.watch(llm)
    tiny.generate(llm, tiny.prompts(6, seed=8))
    for index, budget in budgets.items():
        mine = [call for call in calls if call.layer.index == index]
        tiny.assert_bounded(mine, budget)
        assert max(int(call.outcome.union_SE.sum()) for call in mine) == budget
    [report] = llm.collective_rpc("carpool_report")
    assert report["policy"] == "set per layer"
    for layer in report["layers"]:
        assert layer["rows_changed"] > 0
        assert layer["surrogate_pairs"] > 0


def refused(stats: dict[str, Any], message: str, tmp_path: Path, **changes: Any) -> None:
    """The statistics, with these tensors or facts changed, are refused for the engine's model."""
    from carpool.hosts.engine.settings import Settings
    from carpool.hosts.vllm.layers import build_layers

    given, path = Statistics.load(shipped()), tmp_path / "other.safetensors"
    layers = {
        index: {name: value for name, value in {**tensors, **stats}.items() if value is not None}
        for index, tensors in given.layers.items()
    }
    replace(given, layers=layers, **changes).save(path)
    runner = tiny.runner(engine())
    settings = Settings.of({"carpool": sharing() | {"stats": str(path)}})
    with pytest.raises(CarpoolError, match=message):
        build_layers(runner.get_model(), settings, runner.vllm_config, torch.device("cpu"))


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    E, H = tiny.EXPERTS, tiny.SIZES["hidden_size"]
    refused({}, "of another model", tmp_path, fingerprint="0" * 64)
    refused({"surrogate_in": None}, "hold no 'surrogate_in'", tmp_path)
    refused({"surrogate_energy": None}, "needs the statistics 'surrogate_energy'", tmp_path)
    refused({"surrogate_in": torch.zeros(E, RANK + 1, H)}, "do not fit together", tmp_path)
    refused({"surrogate_in_scale": None}, "without fitting factors", tmp_path)
    wide = {"surrogate_in": torch.zeros(E, RANK, 2 * H), "surrogate_out": torch.zeros(E, RANK + 1, 2 * H)}
    refused(wide, rf"{E} experts of width {2 * H}, but the kernel runs {E} of width {H}", tmp_path)


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        ("routed_experts", "apply_router_weight_on_input", "no plain sum"),
        ("moe_config", "is_lora_enabled", "adapters"),
    ],
)
def test_experts_that_are_no_plain_sum_are_refused(
    place: str, name: str, message: str, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carpool.hosts.vllm.supplement import resident

    layer = tiny.host(shared).layers[0]
    monkeypatch.setattr(getattr(layer.runner, place), name, True)
    with pytest.raises(CarpoolError, match=rf"layers\.0\.mlp\.experts .*{message}"):
        resident(layer)


def test_experts_that_are_bypassed_are_noticed(shared: Any) -> None:
    """What was left to surrogates must have been added when the next step routes, and after the first one."""
    from carpool.hosts.vllm.router import routed

    host = tiny.host(shared)
    layer, left = host.layers[1], (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 4))
    logits_NE = torch.zeros(2, tiny.EXPERTS)

    def step() -> None:
        rows = host.step.rows
        rows.sharing = rows.real = 2
        try:
            host.proof.stepped()
        finally:
            rows.clear()
            host.proof.begin()

    host.proof.begin()
    for again in (step, lambda: routed(layer, torch.zeros(2, 64), logits_NE, carpool.Routing(*left))):
        layer.left = left
        with pytest.raises(CarpoolError, match=r"layers\.1\.mlp\.experts: the engine bypassed its experts"):
            again()
        layer.left = None


@pytest.mark.slow
def test_a_compiled_engine_adds_them(shared: Any) -> None:
    """torch.compile traces through experts and router; policies change while it runs."""
    llm = tiny.engine(tiny.qwen3(), sharing() | {"compile": True}, enforce_eager=False)
    assert all(layer.resident.sum is not None for layer in tiny.host(llm).layers)
    given = tiny.prompts(6)
    for settings in ({}, {"enabled": False}, {"enabled": True}, {"policy": tiny.POLICY}, {"policy": "surrogate(12)"}):
        for one in (llm, shared):
            one.collective_rpc("carpool_set", kwargs=settings)
        found, wanted = tiny.generate(llm, given), tiny.generate(shared, given)
        assert [ids for ids, _ in found] == [ids for ids, _ in wanted], settings
        for (_, mine), (_, theirs) in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.slow
def test_two_ranks_add_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    envs.disable_envs_cache()  # of an engine that was started before in this process
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    llm = tiny.engine(tiny.qwen3(), sharing(), tensor_parallel_size=2)
    given = tiny.prompts(6)
    found = tiny.generate(llm, given)
    first, second = llm.collective_rpc("carpool_report")
    assert first == second
    assert all(layer["surrogate_pairs"] > 0 for layer in first["layers"])
    # half of the rows of every map, and a bias that is 0 on the second rank
    assert first["surrogate_memory"] == 2 * tiny.EXPERTS * (RANK + 1) * (tiny.SIZES["hidden_size"] + 4)
    envs.disable_envs_cache()
    monkeypatch.undo()
    wanted = tiny.generate(engine(), given)
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    for (_, mine), (_, theirs) in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
