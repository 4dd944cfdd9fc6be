"""Keys that are nearly Carpool's: warned of; and what requests say that means nothing, refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from carpool import CarpoolError
from carpool.hosts.engine import near_keys
from carpool.hosts.engine.log import log
from carpool.hosts.engine.request_keys import check_request
from carpool.hosts.vllm import arm


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is logged, whatever an engine that ran before made of vLLM's loggers."""
    records: list[str] = []
    logger = log()
    monkeypatch.setattr(logger, "warning", lambda text, *given: records.append(text % given))
    monkeypatch.setattr(near_keys, "_said", set())
    return lambda: records


@pytest.mark.parametrize("key", ["carpol", "Carpool", "carpools", "car_pool", "carpool_policy", "CARPOOL"])
def test_a_key_near_ours_is_warned_of(said: Any, key: str) -> None:
    arm._configured(None, SimpleNamespace(additional_config={key: {"policy": "topk(k=2)"}}))
    [warning] = said()
    assert repr(key) in warning
    assert "'carpool'" in warning


@pytest.mark.parametrize("key", ["gdn_prefill_backend", "ascend_scheduler_config", "pool", "car", "carpool_version", 7])
def test_other_peoples_keys_are_theirs(said: Any, key: Any) -> None:
    arm._configured(None, SimpleNamespace(additional_config={key: 1}))
    arm._configured(None, SimpleNamespace(additional_config="carpol"))
    assert not said()


def request(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("carpol", "carpool"), ("carpol_tenant", "carpool_tenant"), ("carpool_promt", "carpool_prompt"),
     ("Carpool_Tenant", "carpool_tenant"), ("carpool_k", "carpool")],
)  # fmt: skip
def test_a_requests_near_key_is_warned_of_once(said: Any, key: str, meant: str) -> None:
    for _ in range(3):
        check_request(request(**{key: "a", "other": 1}))
    [warning] = said()
    assert repr(key) in warning
    assert repr(meant) in warning


def test_long_keys_are_cut(said: Any) -> None:
    check_request(request(**{"carpool" + "x" * 1000: 1}))
    assert len(said()[0]) < 300


@pytest.mark.parametrize("extra", [{}, {"carpool": "on"}, {"carpool": "off"}, {"carpool_tenant": "a"},
                                   {"carpool_prompt": 7}, {"carpool_tenant": ""}, {"carpool_tenant": None},
                                   {"_carpool_samples": "x"}, {"top_k": 1}], ids=repr)  # fmt: skip
def test_what_a_request_may_say(said: Any, extra: dict[str, Any]) -> None:
    check_request(request(**extra))
    check_request(None)  # pooling
    assert not said()


@pytest.mark.parametrize("extra", [{"carpool": "xshare(budget=8)"}, {"carpool": True}, {"carpool": None},
                                   {"carpool": ["off"]}, {"carpool_tenant": ["a"]}, {"carpool_tenant": True},
                                   {"carpool_prompt": 1.5}], ids=repr)  # fmt: skip
def test_what_means_nothing_is_refused_in_a_sentence(extra: dict[str, Any]) -> None:
    [(name, value)] = extra.items()
    with pytest.raises(CarpoolError) as caught:
        check_request(request(**extra))
    assert f'"{name}": {value!r}' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_front_end_refuses_the_request() -> None:
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"carpool": {}}))
    parameters = SimpleNamespace(extra_args={"carpool": "xshare(budget=8)"}, n=1)
    with pytest.raises(CarpoolError, match="xshare"):
        arm._request_processed(processor, SimpleNamespace(sampling_params=parameters))
    processor.vllm_config.additional_config = {}
    arm._request_processed(processor, SimpleNamespace(sampling_params=parameters))  # not ours
