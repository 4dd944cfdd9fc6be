"""Who the rows are in the real engine: prompts, chunks, mixed batches, preemption; what the prefix cache may share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool.hosts.vllm import follow as seam

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm
BUDGET = tiny.BUDGET
CARPOOL = tiny.SHARING


@functools.cache
def small_engine() -> Any:
    """An engine that cuts prompts into chunks of 32 tokens."""
    return tiny.engine(tiny.qwen3(), CARPOOL, max_num_batched_tokens=32, enable_prefix_caching=False)


def facts_v1(runner: Any) -> dict[str, Any]:
    batch, n = runner.input_batch, runner.input_batch.num_reqs
    return {
        "requests": list(batch.req_ids), "computed": batch.num_computed_tokens_cpu[:n].tolist(),
        "prompt": batch.num_prompt_tokens[:n].tolist(), "starts": runner.query_start_loc.np[: n + 1].tolist(),
    }  # fmt: skip


def facts_v2(runner: Any, batch: Any) -> dict[str, Any]:
    return {
        "requests": list(batch.req_ids), "computed": batch.num_computed_tokens_np.tolist(),
        "prompt": runner.req_states.prompt_len.np[batch.idx_mapping_np].tolist(),
        "starts": batch.query_start_loc_np[: batch.num_reqs + 1].tolist(),
    }  # fmt: skip


def follow(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the engine's batch and our rows of every forward pass from now on."""
    host, steps, latest = tiny.host(llm), list[dict[str, Any]](), dict[str, Any]()
    runner = tiny.runner(llm)
    fill = host.step.rows.fill

    def filled(requests: Any, num_rows: int) -> None:
        fill(requests, num_rows)
        steps.append({
            **(latest if tiny.v2() else facts_v1(runner)),
            "rows": host.step.rows.batch(num_rows).exempt_N.tolist(),
            "voters": host.step.rows.batch(num_rows).voter_N.tolist(),
        })  # fmt: skip

    requests_v2 = seam.requests_v2

    def seen(batch: Any, parameters: dict[str, Any]) -> Any:
        latest.update(facts_v2(runner, batch))
        return requests_v2(batch, parameters)

    assert runner is not None
    if tiny.v2():
        monkeypatch.setattr(seam, "requests_v2", seen)
    host.step.rows.fill = filled
    return steps


def run(llm: Any, arrivals: dict[int, list[list[int]]], tokens: int) -> dict[str, list[int]]:
    """Step the engine; `arrivals` maps a step to the prompts that arrive before it."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    engine, done, step, count = llm.llm_engine, {}, 0, 0
    while engine.has_unfinished_requests() or any(at >= step for at in arrivals):
        for ids in arrivals.get(step, []):
            engine.add_request(f"r{count}", {"prompt_token_ids": ids}, parameters)
            count += 1
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return done


def test_prompts_chunks_and_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_engine()
    steps, outcomes = follow(llm, monkeypatch), list[Any]()
    tiny.host(llm).step.observer = lambda layer, logits_NE, outcome: outcomes.append(outcome)
    done = run(llm, {0: tiny.prompts(4), 3: tiny.prompts(2, length=50, seed=1), 5: tiny.prompts(3, length=1)}, 10)
    assert len(done) == 9
    kinds = set()
    for step in steps:
        for i, (start, end) in enumerate(zip(step["starts"], step["starts"][1:], strict=False)):
            prefill = step["computed"][i] < step["prompt"][i]
            kinds.add((prefill, end - start > 1, len(set(step["rows"])) == 2))
            assert set(step["rows"][start:end]) == {prefill}
            assert set(step["voters"][start:end]) == {not prefill}
    # a one-token prompt, a chunk of a long one beside decoding rows, and decoding alone
    assert {(True, False, True), (True, True, True), (False, False, False)} <= kinds
    mixed = 0
    for outcome in outcomes:
        batch, inputs = outcome.inputs.batch, outcome.inputs
        prompt_N = batch.exempt_N & batch.real_N
        assert not outcome.changed_N[prompt_N].any()
        free_E = inputs.native_NE[prompt_N].any(0)
        charged_E = outcome.union_SE[0] & ~free_E
        assert int(charged_E.sum()) <= max(BUDGET, int(batch.voter_N.sum()))  # each voter's best is kept
        mixed += bool(prompt_N.any())
    assert mixed > 0
    assert sum(int(outcome.changed_N.sum()) for outcome in outcomes) > 0


@pytest.mark.parametrize(("name", "cached"), [("shared", 32), ("stock", 96)])
def test_generated_tokens_are_not_found_in_the_prefix_cache(name: str, cached: int) -> None:
    """Two turns of a chat: the second prompt holds the first answer. Stock finds all three full blocks, the plugin
    only the one of the first prompt."""
    from vllm import SamplingParams

    llm = tiny.shared_engine() if name == "shared" else tiny.stock_engine()
    given = tiny.prompts(4, length=40, seed=99)
    turns = [[*ids, *answer] for ids, (answer, _) in zip(given, tiny.generate(llm, given, tokens=60), strict=True)]
    parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in turns], parameters, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [cached] * 4
    if name == "shared":  # so the second user gets what the model says without anybody's batch
        native = tiny.generate(small_engine(), turns, tokens=1)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [ids for ids, _ in native]


@pytest.mark.parametrize("chunk", [0, 1])
def test_recomputed_rows_after_a_preemption_are_exempt(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of five blocks for four requests of two blocks each: some are thrown out and computed again, in chunks
    that reach beyond the prompt, as large as fits (0) or of one row, which looks like decoding."""
    options = {"num_gpu_blocks_override": 6, "max_model_len": 128, "max_num_batched_tokens": 32}
    llm = tiny.engine(tiny.qwen3(), CARPOOL, long_prefill_token_threshold=chunk, **options)
    steps = follow(llm, monkeypatch)
    done = run(llm, {0: tiny.prompts(4, length=20)}, 40)
    assert sorted(len(ids) for ids in done.values()) == [40] * 4
    reached: dict[str, int] = {}  # tokens of each request that were computed at some time
    recomputed, again = [], set()
    for step in steps:
        for i, (start, end) in enumerate(zip(step["starts"], step["starts"][1:], strict=False)):
            name, computed = step["requests"][i], step["computed"][i]
            if step["prompt"][i] <= computed < reached.get(name, 0):
                assert set(step["rows"][start:end]) == {True}
                recomputed.append(end - start)
                again.add(name)
            elif computed >= step["prompt"][i] and end - start == 1:
                last = tiny.v2() and name in again  # to the V2 runner the row after these is the last of a prompt
                assert step["rows"][start:end] == [last]
                again.discard(name)
            reached[name] = max(reached.get(name, 0), computed + end - start)
    assert set(recomputed) == {1} if chunk else max(recomputed) > 1


def test_profiling_and_dummy_rows_do_not_count() -> None:
    llm = small_engine()
    llm.collective_rpc("carpool_report", kwargs={"reset": True})
    calls: list[Any] = []
    tiny.host(llm).step.observer = lambda *given: calls.append(given)
    tiny.runner(llm)._dummy_run(16)
    rows = tiny.host(llm).step.rows
    assert not calls
    assert not rows.batch(16).real_N.any()
    # as a recorded graph would run it: every row is padding, and nothing is counted
    tiny.host(llm).step.graphs = True
    tiny.runner(llm)._dummy_run(16)
    tiny.host(llm).step.graphs = False
    assert len(calls) == 2
    assert all(not outcome.changed_N.any() for _, _, outcome in calls)
    [report] = llm.collective_rpc("carpool_report")
    for layer in report["layers"]:
        assert not any(value for name, value in layer.items() if name != "layer" and not name.endswith("_bytes"))


def test_graphs_take_new_numbers_and_refuse_a_new_kind() -> None:
    """The path of an engine that records graphs, run eagerly: numbers sit in tensors."""
    from carpool import CarpoolError, parse

    llm = small_engine()
    host = tiny.host(llm)
    host.step.graphs = True
    assert isinstance(host.layers[0].knobs.plan.policy.budget, torch.Tensor)
    unions: dict[int, int] = {}
    for budget in (6, 12):
        llm.collective_rpc("carpool_set", kwargs={"policy": f"xshare(budget={budget})"})
        outcomes: list[Any] = []
        host.step.observer = lambda layer, logits_NE, outcome, seen=outcomes: seen.append(outcome)
        tiny.generate(llm, tiny.prompts(6))
        batches = [outcome.inputs.batch for outcome in outcomes]
        decoded = [o for o, b in zip(outcomes, batches, strict=True) if b.voter_N.any() and not b.exempt_N.any()]
        unions[budget] = max(int(outcome.union_SE.sum()) for outcome in decoded)
    assert unions[6] <= 6 < unions[12] <= 12
    with pytest.raises(CarpoolError, match="CUDA graphs hold the kind"):
        llm.collective_rpc("carpool_set", kwargs={"policy": "oea(k0=2)"})
    with pytest.raises(CarpoolError, match="CUDA graphs hold the kind"):
        host.layers[0].knobs.check(parse("xshare(budget=6, utility='squared')").for_serving())
    tiny.host(llm).step.enabled = False
    before = len(outcomes)
    tiny.generate(llm, tiny.prompts(6))
    assert not any(outcome.changed_N.any() for outcome in outcomes[before:])
