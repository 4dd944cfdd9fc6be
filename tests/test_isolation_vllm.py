"""In the real engine: what a tenant's rows were routed to is what they are routed to without anybody else's rows.

The CPU build has no batch invariant mode, so logits may differ in their last bits between batches: what is compared is
the routing that the engine ran against the routing of the same captured logits, alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import Batch, CarpoolError, route

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def leave_the_shared_engine_as_it_was() -> Iterator[None]:
    yield
    if tiny.shared_engine.cache_info().currsize:
        llm = tiny.shared_engine()
        llm.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY, "enabled": True})
        llm.collective_rpc("carpool_report", kwargs={"reset": True})


@functools.cache
def by_tenant() -> Any:
    return tiny.engine(tiny.qwen3(), {"policy": tiny.POLICY, "isolation": "tenant"}, max_num_batched_tokens=48)


def serve(llm: Any, tenants: list[Any], seed: int, **more: Any) -> list[list[int]]:
    """Greedy tokens of requests of these tenants, with prompts of unequal length."""
    from vllm import SamplingParams

    given = [ids[: 2 + i % 5] for i, ids in enumerate(tiny.prompts(len(tenants), length=7, seed=seed))]
    parameters = [
        SamplingParams(
            max_tokens=10, temperature=0, detokenize=False, ignore_eos=True,
            extra_args=more if tenant is None else more | {"carpool_tenant": tenant},
        )
        for tenant in tenants
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in given], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def replay(call: tiny.Call, rows_N: torch.Tensor) -> None:
    """The rows alone get the experts and weights that they got in the engine's step."""
    batch = call.batch
    groups = batch.group_N[rows_N].unique(return_inverse=True)
    own = {name: getattr(batch, name)[rows_N] for name in ("real_N", "voter_N", "exempt_N", "step_N", "request_N")}
    alone = replace(batch, **own, group_N=groups[1], num_groups=len(groups[0]))
    layer, logits_NE = call.layer, call.logits_NE
    again = route(layer.plan, layer.spec, logits_NE[rows_N], alone, stats=layer.stats)
    assert torch.equal(again.changed_N, call.outcome.changed_N[rows_N])
    changed_N = again.changed_N
    assert torch.equal(again.routing.ids_NK[changed_N], call.outcome.routing.ids_NK[rows_N][changed_N])
    assert torch.equal(again.routing.weights_NK[changed_N], call.outcome.routing.weights_NK[rows_N][changed_N])


def test_a_tenants_rows_do_not_hear_strangers() -> None:
    llm = by_tenant()
    llm.collective_rpc("carpool_set", kwargs={"policy": "xshare(budget=6)"})
    calls = tiny.watch(llm)
    for seed in range(3):
        serve(llm, ["mine", "b", "mine", None, "mine", "b", None, 7][: 6 + seed], seed)
    tiny.host(llm).step.observer = None
    shared = strangers = 0
    for call in calls:
        batch: Batch = call.batch
        for group in batch.group_N[batch.voter_N].unique().tolist():
            rows_N = ((batch.group_N == group) & batch.real_N).nonzero().flatten()
            replay(call, rows_N)
            voters = int(batch.voter_N[rows_N].sum())
            changed = int(call.outcome.changed_N[rows_N].sum())
            assert voters > 1 or not changed  # who is alone keeps the native routing
            shared += changed
            strangers += len(rows_N) < int(batch.real_N.sum())
    assert shared > 0
    assert strangers > 20


@pytest.mark.parametrize("tenant", [True, 1.5, ["one"], {"one": 1}], ids=repr)
def test_a_tenant_that_is_no_name_is_refused(tenant: Any) -> None:
    with pytest.raises(CarpoolError, match="give a text or a whole number, or leave it out"):
        serve(by_tenant(), [tenant] * 2, 1)


@pytest.mark.parametrize("tenant", [None, ""], ids=repr)
def test_requests_without_a_tenant_are_stock(tenant: Any) -> None:
    """Nothing is refused and nobody shares with a stranger by mistake, although all of them send the same."""
    llm = by_tenant()
    llm.collective_rpc("carpool_set", kwargs={"enabled": True})
    llm.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY})
    calls = tiny.watch(llm)
    tokens = serve(llm, [tenant] * 6, 5)
    assert len(calls) > 0
    assert not any(call.outcome.changed_N.any() for call in calls)
    tiny.host(llm).step.observer = None
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    assert serve(llm, [tenant] * 6, 5) == tokens
    llm.collective_rpc("carpool_set", kwargs={"enabled": True})
    assert serve(llm, ["one"] * 6, 5) != tokens


@pytest.mark.parametrize("policy", ["topk(k=2)", "tail_mass(beta=0.5)", "allow_list(experts=[0, 1, 2, 3, 4, 5])"])
def test_token_local_policies_hear_nobody(policy: str) -> None:
    llm = by_tenant()
    llm.collective_rpc("carpool_set", kwargs={"policy": policy})
    calls = tiny.watch(llm)
    serve(llm, ["a", None, "a", "b"], 1)
    tiny.host(llm).step.observer = None
    for call in calls:
        for index in call.batch.real_N.nonzero().flatten():
            replay(call, index.unsqueeze(0))
    assert sum(int(call.outcome.changed_N.sum()) for call in calls) > 0


def test_the_engine_does_not_widen_its_isolation_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    llm = by_tenant()
    before = tiny.host(llm).layers[0].plan
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.raises(CarpoolError, match="VLLM_BATCH_INVARIANT"):
        llm.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY})
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", False, raising=False)
    settings = tiny.host(llm).settings
    monkeypatch.setattr(tiny.host(llm), "settings", replace(settings, isolation="request"))
    with pytest.raises(CarpoolError, match='write "isolation": "tenant"'):
        llm.collective_rpc("carpool_set", kwargs={"policy": tiny.POLICY})
    assert tiny.host(llm).layers[0].plan == before


PLACES = (0, 3, 5)  # of the victim's requests among eight


def victims_logprobs(llm: Any, seed: int, tenants: bool) -> list[Any]:
    """What the victim's requests are told beside five strangers' made from a seed; the shape of every step is the
    same."""
    from vllm import SamplingParams

    mine, others = tiny.prompts(8, seed=1000), tiny.prompts(8, seed=seed)
    parameters = [
        SamplingParams(
            max_tokens=8, temperature=0, detokenize=False, ignore_eos=True, logprobs=20,
            extra_args={"carpool_tenant": "mine" if i in PLACES else "theirs"} if tenants else None,
        )
        for i in range(8)
    ]  # fmt: skip
    given = [{"prompt_token_ids": mine[i] if i in PLACES else others[i]} for i in range(8)]
    outputs = llm.generate(given, parameters, use_tqdm=False)
    return [
        [{token: one.logprob for token, one in step.items()} for step in outputs[i].outputs[0].logprobs] for i in PLACES
    ]


@functools.cache
def by_request() -> Any:
    return tiny.engine(tiny.qwen3(), {"policy": "topk(k=2)", "isolation": "request"})


@pytest.mark.parametrize(
    ("isolation", "policy", "alike"),
    [
        ("request", "xshare(budget=3, warmup=0) | min_batch(1)", True), ("request", "topk(k=2)", True),
        ("tenant", "xshare(budget=6)", True), ("tenant", "oea(k0=1)", True),
        ("tenant", "xshare(budget=6) | floor(0.3)", True),
        ("batch", "topk(k=2)", True), ("batch", "xshare(budget=6)", False), ("batch", "oea(k0=1)", False),
    ],
)  # fmt: skip
def test_strangers_change_no_bit_of_a_victims_log_probabilities(isolation: str, policy: str, alike: bool) -> None:
    """End to end, where the engine itself is batch invariant: one thread, float32, eager, and steps of one shape."""
    llm = {"request": by_request, "tenant": by_tenant, "batch": tiny.shared_engine}[isolation]()
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    stock = [victims_logprobs(llm, seed, isolation == "tenant") for seed in range(4)]
    if any(one != stock[0] for one in stock):
        pytest.skip("this machine's kernels round a row by what is beside it")
    llm.collective_rpc("carpool_set", kwargs={"enabled": True, "policy": policy})
    found = [victims_logprobs(llm, seed, isolation == "tenant") for seed in range(4)]
    assert found[0] != stock[0]  # the policy acts
    assert all(one == found[0] for one in found) == alike


def test_the_counters_show_the_floor_at_work() -> None:
    """What an operator can read: with a floor the mean displaced mass of the rows that share stays below it, and the
    experts read on its account are counted."""
    llm, found = tiny.shared_engine(), dict[str, dict[str, float]]()
    for policy in ("xshare(budget=6)", "xshare(budget=6) | floor(0.1)"):
        llm.collective_rpc("carpool_set", kwargs={"enabled": True, "policy": policy})
        llm.collective_rpc("carpool_report", kwargs={"reset": True})
        tiny.generate(llm, tiny.prompts(8))
        [report] = llm.collective_rpc("carpool_report")
        names = ("displaced_mass", "rows", "rows_exempt", "floor_overflow")
        found[policy] = {name: sum(layer[name] for layer in report["layers"]) for name in names}
    bare, floored = found.values()
    assert bare["displaced_mass"] > 0.1 * (bare["rows"] - bare["rows_exempt"])
    assert bare["floor_overflow"] == 0
    assert 0 < floored["displaced_mass"] <= 0.1 * (floored["rows"] - floored["rows_exempt"])
    assert floored["floor_overflow"] > 0
