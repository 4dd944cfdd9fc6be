"""Other ways to run the engine: compiled, with speculation, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import vllm_models as tiny

from carpool.hosts.vllm.follow import drafter

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def report(llm: Any) -> list[dict[str, Any]]:
    """Counters of every layer since the last call."""
    layers: list[dict[str, Any]] = llm.collective_rpc("carpool_report", kwargs={"reset": True})[0]["layers"]
    return layers


def test_a_compiled_engine_shares_and_follows_changes() -> None:
    """torch.compile traces through the router on a CPU: a policy that is traced is frozen, or silently gone."""
    llm = tiny.engine(tiny.qwen3(), tiny.SHARING, enforce_eager=False)
    given = tiny.prompts(6)
    for layer in report(llm):
        assert layer["rows"] == 0  # the profiling run does not count
    shared = tiny.generate(llm, given)
    for layer in report(llm):
        assert layer["rows_changed"] > 0
        assert layer["union"] <= layer["steps"] * tiny.BUDGET < layer["natural_union"]
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    native = tiny.generate(llm, given)
    assert [layer["rows"] for layer in report(llm)] == [0, 0]
    assert [ids for ids, _ in native] == [ids for ids, _ in tiny.generate(tiny.stock_engine(), given)]
    assert native != shared
    llm.collective_rpc("carpool_set", kwargs={"policy": "oea(k0=2)", "enabled": True})
    tiny.generate(llm, given)
    for layer in report(llm):
        assert layer["rows_changed"] > 0
        assert layer["union"] > layer["steps"] * tiny.BUDGET * 0.75


def test_speculation_by_ngram_groups_the_rows_of_a_request() -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = tiny.engine(tiny.qwen3(), {"policy": tiny.POLICY, "group": "request"}, speculative_config=ngram)
    voters, changed = list[int](), 0

    def observe(layer: Any, logits_NE: Any, outcome: Any) -> None:
        nonlocal changed
        rows_G, inputs = outcome.inputs.voters_G1.flatten(), outcome.inputs
        size_G = (outcome.coreset_GE & ~inputs.free_GE).sum(-1)
        assert (size_G[rows_G >= 2] <= tiny.BUDGET).all()
        assert not outcome.changed_N[(rows_G == 1)[inputs.batch.group_N]].any()
        voters.extend(rows_G.tolist())
        changed += int(outcome.changed_N.sum())

    tiny.host(llm).step.observer = observe
    tiny.generate(llm, [[7, 8] * 10, [9, 10, 11] * 8, [12] * 20], tokens=24)
    assert max(voters) == 4  # one row and three drafts
    assert changed > 0


@pytest.mark.parametrize("merge", ["topup", "prune"])
def test_the_policy_for_speculation_sees_requests_inside_the_batch(merge: str) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    policy = f"xshare_speculative(budget=10, request_budget=4, warmup=0, merge={merge!r})"
    llm = tiny.engine(tiny.qwen3(), {"policy": policy, "isolation": "batch"}, speculative_config=ngram)
    sizes, requests = list[int](), set[int]()

    def observe(layer: Any, logits_NE: Any, outcome: Any) -> None:
        inputs = outcome.inputs
        if bool((outcome.coreset_GE & ~inputs.free_GE).all()):
            return  # fewer than two voters
        sizes.append(int((outcome.coreset_GE & ~inputs.free_GE).sum()))
        requests.update(inputs.batch.request_N[inputs.batch.voter_N].tolist())

    tiny.host(llm).step.observer = observe
    tiny.generate(llm, [[7, 8] * 10, [9, 10, 11] * 8, [12] * 20], tokens=24)
    assert requests == {0, 1, 2}
    assert max(sizes) <= (12 if merge == "topup" else 10)  # three requests of four experts each


def test_a_draft_model_is_left_alone() -> None:
    folder = str(tiny.qwen3())
    llm = tiny.engine(
        tiny.qwen3(), tiny.SHARING,
        speculative_config={"method": "draft_model", "model": folder, "num_speculative_tokens": 2},
    )  # fmt: skip
    runner = tiny.runner(llm)
    for model, kind in ((runner.get_model(), "SharedCPURouter"), (drafter(runner).model, "CPURouter")):
        routers = {type(m.router).__name__ for m in model.modules() if hasattr(m, "routed_experts")}
        assert routers == {kind}
    tiny.generate(llm, tiny.prompts(4))
    for layer in report(llm):
        assert layer["rows_changed"] > 0


def test_two_ranks_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    envs.disable_envs_cache()  # of an engine that was started before in this process
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    llm = tiny.engine(tiny.qwen3(), tiny.SHARING, tensor_parallel_size=2)
    shared = tiny.generate(llm, tiny.prompts(6))
    first, second = llm.collective_rpc("carpool_report")
    assert first == second
    assert all(layer["rows_changed"] > 0 for layer in first["layers"])
    envs.disable_envs_cache()
    monkeypatch.undo()
    assert [ids for ids, _ in shared] == [ids for ids, _ in tiny.generate(tiny.shared_engine(), tiny.prompts(6))]
