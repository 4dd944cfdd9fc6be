"""The SGLang host's own parts, without SGLang: who the rows are, what the radix cache takes, what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carpool import CarpoolError
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Rows
from carpool.hosts.sglang import arm, denoising, engine, follow, weights
from carpool.hosts.sglang.configuration import settings_of
from carpool.hosts.sglang.distinct import distinct
from carpool.hosts.sglang.prefix_cache import prompts_only
from carpool.routing.cold import TeamCold

SHARING = {"policy": "xshare(budget=8)", "isolation": "batch"}
DEVICE = torch.device("cpu")


class Mode:
    """SGLang's `ForwardMode`, as far as it is asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_decode(self) -> bool:
        return self.name == "decode"

    def is_target_verify(self) -> bool:
        return self.name == "verify"


def forwarded(mode: str, rows: int, requests: int, decoding: int = 0, lengths: list[int] | None = None) -> Any:
    """A batch as SGLang forwards it; the last `decoding` requests of a mixed one decode."""
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(custom_params=None)) for _ in range(requests)]
    batch = SimpleNamespace(reqs=reqs, decoding_reqs=reqs[requests - decoding :] if decoding else None)
    made = SimpleNamespace(forward_mode=Mode(mode), input_ids=torch.zeros(rows), extend_seq_lens_cpu=lengths)
    return follow.remembered(lambda *_: made, None, batch)


def exempt(batch: Any) -> list[bool]:
    requests = follow.requests_of(batch)
    assert requests is not None
    rows = Rows(32, 8, "batch", DEVICE)
    rows.fill(requests, len(batch.input_ids))
    return rows.batch(len(batch.input_ids)).exempt_N.tolist()


def test_rows_that_decode_share_and_prompts_do_not() -> None:
    assert exempt(forwarded("decode", 3, 3)) == [False] * 3
    assert exempt(forwarded("verify", 6, 2)) == [False] * 6, "drafts of two requests"
    assert exempt(forwarded("extend", 5, 2, lengths=[2, 3])) == [True] * 5
    assert exempt(forwarded("mixed", 6, 4, decoding=2, lengths=[1, 3, 1, 1])) == [True] * 4 + [False] * 2


def test_what_has_no_requests_has_no_rows() -> None:
    """Warm-up, the capture of graphs and idle batches."""
    assert follow.requests_of(SimpleNamespace(forward_mode=Mode("decode"), input_ids=torch.zeros(4))) is None
    assert follow.requests_of(forwarded("idle", 0, 0)) is None
    assert denoising.requests_of(SimpleNamespace(), settings()) is None
    unknown = blocks([[1, 9]])
    del unknown.carpool_algorithm
    with pytest.raises(CarpoolError, match="past SGLang's DllmAlgorithm"):
        denoising.requests_of(unknown, settings())


def settings(**given: Any) -> Settings:
    found = settings_of(SimpleNamespace(json_model_override_args=json.dumps({"carpool": SHARING | given})))
    assert found is not None
    return found


def blocks(tokens: list[list[int]], prompts: list[list[bool]] | None = None) -> Any:
    made = forwarded("dllm", len(tokens) * len(tokens[0]), len(tokens))
    made.input_ids = torch.tensor(tokens).flatten()
    made.dllm_prompt_mask = None if prompts is None else torch.tensor(prompts)
    made.carpool_algorithm = SimpleNamespace(block_size=len(tokens[0]), mask_id=9)
    return made


def test_blocks_without_a_mask_are_native() -> None:
    made = blocks([[1, 9], [1, 2], [9, 9]])
    requests = denoising.requests_of(made, settings())
    assert requests is not None
    assert requests.prefill.tolist() == [False, True, False]
    assert requests.lengths.tolist() == [2, 2, 2]
    assert requests.votes is None
    asked = denoising.requests_of(blocks([[1, 9], [9, 9]], [[True, True], [True, False]]), settings())
    assert asked is not None
    assert asked.prefill.tolist() == [True, False], "a prompt may hold the mask token"


def test_cold_rows_have_no_say_once_a_step_has_predicted() -> None:
    chosen = settings(voters="team_cold(confidence=0.5, near=0, surest=1)")
    made = blocks([[1, 9, 9, 9], [9, 9, 9, 9]])
    first = denoising.requests_of(made, chosen)
    assert first is not None
    assert first.votes is not None
    assert first.votes.all()
    logits = torch.zeros(8, 16)
    logits[:, 3] = torch.tensor([0.0, 9.0, 0.5, 0.1, 0.1, 0.2, 0.3, 0.4])
    algorithm = made.carpool_algorithm
    denoising._stepped(lambda *_: [False, True], algorithm, made, logits)
    second = denoising.requests_of(made, chosen)
    assert second is not None
    assert second.votes is not None
    assert second.votes.tolist() == [True, True, False, False, True, True, True, True], "the second block is a new one"
    rows = Rows(16, 4, "request", DEVICE)
    rows.fill(second, 8)
    batch = rows.batch(8)
    assert batch.voter_N.tolist() == second.votes.tolist()
    assert not batch.exempt_N.any(), "cold rows are bound"


@pytest.mark.parametrize(
    "text", ["cold()", "team_cold(0.7)", "team_cold(near=[1])", "team_cold(tau=1)", "team_cold | x"]
)
def test_voters_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CarpoolError, match=r"names no voters; write team_cold\(confidence"):
        settings(voters=text)


def test_voters_are_read() -> None:
    assert settings(voters="team_cold(confidence=0.6, near=4)").voters == TeamCold(0.6, 4)
    with pytest.raises(CarpoolError, match="confidence 2"):
        settings(voters="team_cold(confidence=2)")
    with pytest.raises(CarpoolError, match="has no key 'voters'"):  # of vLLM, which denoises nothing here
        Settings.of({"carpool": SHARING | {"voters": "team_cold()"}})
    none = SimpleNamespace(dllm_algorithm=None)
    with pytest.raises(CarpoolError, match="denoises no blocks"):
        denoising.follow_denoising(none, TeamCold())
    with pytest.raises(CarpoolError, match="not for JointThreshold"):
        denoising.follow_denoising(SimpleNamespace(dllm_algorithm="JointThreshold"), TeamCold())


@pytest.mark.parametrize(("denoises", "up_to", "expected"), [(False, 9, 4), (False, 3, 3), (True, 9, 9)])
def test_the_radix_cache_takes_prompts_only(denoises: bool, up_to: int, expected: int) -> None:
    """And finished blocks, which are written under native routing."""
    request = SimpleNamespace(origin_input_ids=[1, 2, 3, 4], is_dllm=lambda: denoises)
    seen: list[int] = []
    prompts_only(lambda cache, request, *, up_to: seen.append(up_to), None, request, up_to=up_to)
    assert seen == [expected]


def test_a_block_is_the_group_where_blocks_are_denoised() -> None:
    given = json.dumps({"carpool": {"policy": "des_vote(size=8)"}})
    found = settings_of(SimpleNamespace(json_model_override_args=given, dllm_algorithm="LowConfidence"))
    assert found is not None
    assert found.group.kind == "request"
    with pytest.raises(CarpoolError, match="lets the rows of all requests"):
        settings_of(SimpleNamespace(json_model_override_args=given, dllm_algorithm=None))


def test_the_configuration_is_a_key_among_others() -> None:
    assert settings_of(SimpleNamespace(json_model_override_args='{"rope_theta": 1}')) is None
    assert settings_of(SimpleNamespace(json_model_override_args="{")) is None, "SGLang says so itself"
    with pytest.raises(CarpoolError, match=r"json_model_override_args\['carpool'\] has no key 'polcy'"):
        settings_of(SimpleNamespace(json_model_override_args='{"carpool": {"polcy": ""}}'))


@pytest.mark.parametrize("given", [{"policy": "xshare(budget=8)"}, {"polcy": ""}, {"policy": "nothing()"}])
def test_a_configuration_that_cannot_be_read_ends_in_its_sentence(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everything that is refused later: without a traceback where SGLang's command line runs."""
    ended: list[str] = []
    monkeypatch.setattr(arm, "end_with_the_sentence", ended.append)
    arguments = SimpleNamespace(json_model_override_args=json.dumps({"carpool": given}))
    with pytest.raises(CarpoolError):
        arm._resolved(lambda arguments: None, arguments)
    assert ended == ["sglang"]


def test_weights_that_come_past_the_models_own_loading_are_noticed() -> None:
    seen: list[str] = []
    host = SimpleNamespace(weights=SimpleNamespace(replaced=lambda: seen.append("replaced")))
    for runner, expected in ((SimpleNamespace(carpool=host), ["replaced"]), (SimpleNamespace(), [])):
        seen.clear()
        updater = SimpleNamespace(get_model_runner=lambda runner=runner: runner)
        assert weights._updated(lambda updater, name: name, updater, "given") == "given"
        assert seen == expected


def test_a_bias_that_is_replaced_is_the_rules_too() -> None:
    """The rule holds a copy, where the router's is in another precision."""
    bias_E = torch.tensor([0.5, -0.25], dtype=torch.bfloat16)
    layer: Any = SimpleNamespace(
        router=SimpleNamespace(topk_config=SimpleNamespace(correction_bias=bias_E)),
        spec=SimpleNamespace(bias_E=torch.zeros(2)),
    )
    weights.Weights([], [layer], dict, lambda: None)._renew_bias(layer)  # type: ignore[arg-type]
    assert torch.equal(layer.spec.bias_E, bias_E.float())


def test_free_slots_name_what_the_batch_reads() -> None:
    ids = torch.tensor([[5, 5, 5], [7, 2, 5], [2, 7, 2]], dtype=torch.int32)
    given = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.3, 0.2], [0.6, 0.4, 0.0]])
    made = distinct(ids, given, 9)
    assert torch.equal(made[given != 0], ids[given != 0])
    assert all(len(set(row)) == 3 for row in made.tolist())
    assert set(made.flatten().tolist()) == {2, 5, 7}
    assert distinct(ids[1:2], given[1:2], 9) is not None
    alone = distinct(torch.tensor([[4, 4, 4]], dtype=torch.int32), torch.tensor([[1.0, 0.0, 0.0]]), 9)
    assert len(set(alone[0].tolist())) == 3
    assert alone.dtype == torch.int32


PLAIN = {
    "attn_dp_size": 1, "enable_dp_attention": False, "dp_size": 1, "ep_size": 1, "moe_a2a_backend": "none",
    "enable_eplb": False, "ep_num_redundant_experts": 0, "init_expert_location": "trivial",
    "ep_dispatch_algorithm": None, "enable_two_batch_overlap": False, "enable_single_batch_overlap": False,
    "enable_pdmux": False, "disaggregation_mode": "null", "enable_lmcache": False, "enable_flexkv": False,
    "enable_hierarchical_cache": False, "enable_streaming_session": False, "enable_session_radix_cache": False,
    "enable_torch_compile": False, "enable_amd_monokernel": False, "enable_nvidia_megakernel": False,
    "elastic_ep_backend": None, "is_embedding": False, "device": "cpu", "speculative_algorithm": None,
    "dllm_algorithm": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attn_dp_size": 2}, "DP attention"), ({"enable_dp_attention": True}, "DP attention"),
        ({"dp_size": 2}, "one server a replica"), ({"ep_size": 2}, "expert parallelism"),
        ({"moe_a2a_backend": "deepep"}, "all-to-all"), ({"enable_eplb": True}, "physical copies"),
        ({"init_expert_location": "x.json"}, "EPLB"), ({"enable_two_batch_overlap": True}, "micro-batches"),
        ({"enable_pdmux": True}, "PD multiplexing"), ({"disaggregation_mode": "decode"}, "disaggregated"),
        ({"enable_hierarchical_cache": True}, "cache outside"), ({"enable_streaming_session": True}, "sessions"),
        ({"enable_torch_compile": True}, "torch.compile"), ({"enable_nvidia_megakernel": True}, "monokernel"),
        ({"elastic_ep_backend": "mooncake"}, "elastic"), ({"is_embedding": True}, "embedding"),
        ({"speculative_algorithm": "EAGLE"}, "only GPUs"), ({"dllm_algorithm": "Gemma4Renoise"}, "no mask token"),
    ],
)  # fmt: skip
def test_set_ups_that_are_not_followed_are_refused(given: dict[str, Any], message: str) -> None:
    engine.check_arguments(SimpleNamespace(**PLAIN))
    with pytest.raises(CarpoolError, match=message):
        engine.check_arguments(SimpleNamespace(**(PLAIN | given)))


def test_promises_that_a_batch_breaks_are_refused() -> None:
    cfg = SimpleNamespace(enable_deterministic_inference=True, enable_return_routed_experts=False)
    [plan] = settings().policies.plans
    with pytest.raises(CarpoolError, match="enable-deterministic-inference promises"):
        engine.require_isolated(plan, settings(), cfg)
    engine.require_isolated(plan, settings(group="request"), cfg)
