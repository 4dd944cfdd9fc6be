"""Siblings in the real engine: the samples of one request share, and nobody else's requests are heard, whatever they
say of themselves."""

from __future__ import annotations

import functools
import itertools
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import vllm_models as tiny
from test_isolation_vllm import replay

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm


@functools.cache
def by_prompt() -> Any:
    return tiny.engine(tiny.qwen3(), {"policy": tiny.POLICY, "group": "prompt"})


@pytest.fixture
def llm() -> Iterator[Any]:
    """The engine, grouped by prompt, and as it was afterwards."""
    engine = by_prompt()
    yield engine
    tiny.host(engine).step.observer = None
    engine.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY, "enabled": True})


def sampled(n: int = 1, tokens: int = 8, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=n, max_tokens=tokens, temperature=1, seed=5, detokenize=False, ignore_eos=True, logprobs=20, **more
    )


def groups_of(call: tiny.Call) -> list[list[int]]:
    """Rows of each group, real ones only."""
    batch = call.batch
    real_N = batch.real_N
    return [
        ((batch.group_N == group) & real_N).nonzero().flatten().tolist()
        for group in batch.group_N[real_N].unique().tolist()
    ]


@pytest.mark.parametrize(("group", "changes"), [("prompt", True), ("request", False)])
def test_the_samples_of_one_request_share(group: str, changes: bool) -> None:
    llm = by_prompt() if group == "prompt" else tiny.engine(tiny.qwen3(), {"policy": tiny.POLICY, "group": "request"})
    calls = tiny.watch(llm)
    llm.generate({"prompt_token_ids": tiny.prompts(1)[0]}, sampled(n=4, tokens=11), use_tqdm=False)
    tiny.host(llm).step.observer = None
    rows = sum(int(call.batch.voter_N.sum()) for call in calls)
    changed = sum(int(call.outcome.changed_N.sum()) for call in calls)
    assert rows == 2 * 4 * 10
    assert (changed > 0) == changes


def test_each_request_shares_among_its_own_samples(llm: Any) -> None:
    calls = tiny.watch(llm)
    numbers = (1, 3, 1, 4, 2)
    given = [{"prompt_token_ids": tiny.prompts(1)[0]} for _ in numbers]  # of equal text, which makes no siblings
    llm.generate(given, [sampled(n) for n in numbers], use_tqdm=False)
    deciding = [call for call in calls if int(call.batch.voter_N.sum()) == sum(numbers)]
    assert len(deciding) > 8
    changed = alone = 0
    for call in deciding:
        groups = groups_of(call)
        assert sorted(map(len, groups)) == sorted(numbers)
        for rows in groups:
            places = call.batch.group_N.new_tensor(rows)
            replay(call, places)
            changed += int(call.outcome.changed_N[places].sum())
            alone += len(rows) == 1
            assert len(rows) > 1 or not call.outcome.changed_N[places].any()
            assert len(call.outcome.routing.ids_NK[places].unique()) <= tiny.BUDGET
    assert changed > 0
    assert alone > 0


@pytest.mark.parametrize("way", ["key", "name", "id"])
def test_a_stranger_cannot_join(llm: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the very key of the victim's samples, not with its name of the prompt, not with an id made like its
    samples' where ids are not randomised."""
    from vllm import envs

    keys = (f"key {i}" for i in itertools.count())
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(keys))
    monkeypatch.setattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", way == "id", raising=False)
    extra = {"key": {"_carpool_samples": "key 0"}, "name": {"carpool_prompt": "p"}, "id": None}[way]
    engine, calls = llm.llm_engine, tiny.watch(llm)
    prompt = {"prompt_token_ids": tiny.prompts(1)[0]}
    engine.add_request("v", prompt, sampled(n=3, extra_args={"carpool_prompt": "p"} if way == "name" else None))
    for name in ("3_v", "30_v", "_v"):
        engine.add_request(name, prompt, sampled(extra_args=extra))
    while engine.has_unfinished_requests():
        engine.step()
    deciding = [call for call in calls if int(call.batch.voter_N.sum()) == 6]
    assert len(deciding) > 8
    assert all(sorted(map(len, groups_of(call))) == [1, 1, 1, 3] for call in deciding)
    assert sum(int(call.outcome.changed_N.sum()) for call in deciding) > 0


def test_samples_that_are_asked_for_one_by_one_share_by_name_within_a_tenant() -> None:
    llm = tiny.engine(tiny.qwen3(), {"policy": "xshare(budget=6)", "group": "prompt", "isolation": "tenant"})
    calls = tiny.watch(llm)
    named = [("a", "p"), ("a", "p"), ("a", "q"), ("b", "p"), (None, "p"), (None, "p")]
    names = [{"carpool_prompt": prompt} | ({"carpool_tenant": tenant} if tenant else {}) for tenant, prompt in named]
    given = [{"prompt_token_ids": ids} for ids in tiny.prompts(len(named))]
    llm.generate(given, [sampled(extra_args=one) for one in names], use_tqdm=False)
    tiny.host(llm).step.observer = None
    deciding = [call for call in calls if int(call.batch.voter_N.sum()) == len(named)]
    assert {tuple(map(tuple, groups_of(call))) for call in deciding} == {((0, 1), (2,), (3,), (4,), (5,))}
    changed_N = sum(call.outcome.changed_N.long() for call in deciding)
    assert changed_N[:2].sum() > 0
    assert changed_N[2:].sum() == 0


@pytest.mark.parametrize("configured", [True, False])
def test_requests_are_marked_where_the_plugin_is_configured_and_nowhere_else(llm: Any, configured: bool) -> None:
    processor = (llm if configured else tiny.stock_engine()).llm_engine.input_processor
    written = {"_carpool_samples": "x", "mine": 1}
    for n in (1, 2):
        given = sampled(n, extra_args=dict(written))
        request = processor.process_inputs("id", {"prompt_token_ids": [5]}, given, supported_tasks=("generate",))
        found = request.sampling_params.extra_args
        assert given.extra_args == written
        assert found.get("mine") == 1
        assert found.get("_carpool_samples") != "x" if configured else found == written
        assert ("_carpool_samples" in found) == (n > 1 or not configured)


def victims_samples(llm: Any, seed: int) -> tuple[list[list[int]], list[Any]]:
    """Tokens and log-probabilities of a victim's three samples beside five of strangers, made from a seed; the shape
    of every step is the same."""
    victim, (first, second) = tiny.prompts(1, seed=1000)[0], tiny.prompts(2, seed=seed)
    stranger = {"carpool_prompt": "p", "_carpool_samples": "p"}
    given = [(first, sampled(2, extra_args=stranger)), (victim, sampled(3, extra_args={"carpool_prompt": "p"})),
             *((second, sampled(1, extra_args=stranger)) for _ in range(3))]  # fmt: skip
    prompts, parameters = zip(*given, strict=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], list(parameters), use_tqdm=False)
    samples = outputs[1].outputs
    said = [[{token: one.logprob for token, one in step.items()} for step in sample.logprobs] for sample in samples]
    return [list(sample.token_ids) for sample in samples], said


@pytest.mark.parametrize("policy", ["xshare(budget=6)", "oea(k0=1)", "xshare(budget=6) | floor(0.3)", "lynx(budget=6)"])
@pytest.mark.parametrize("group", ["prompt", "batch"])
def test_strangers_change_no_bit_of_what_a_prompts_samples_are(group: str, policy: str) -> None:
    """End to end, where the engine itself is batch invariant (see test_isolation_vllm.py); grouped by batch, as the
    control, they do."""
    llm = by_prompt() if group == "prompt" else tiny.shared_engine()
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    stock = [victims_samples(llm, seed) for seed in range(4)]
    llm.collective_rpc("carpool_set", kwargs={"enabled": True, "policy": policy})
    found = [victims_samples(llm, seed) for seed in range(4)]
    llm.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY})
    if any(one != stock[0] for one in stock):
        pytest.skip("this machine's kernels round a row by what is beside it")
    assert len({tuple(ids) for ids in stock[0][0]}) == 3  # they are samples
    assert found[0] != stock[0]  # siblings do share
    assert all(one == found[0] for one in found) == (group == "prompt")
