"""Who shares with whom, by what requests say of themselves: siblings are known by who asked, and cannot be joined."""

from __future__ import annotations

import importlib.util
import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm_models as tiny
from hypothesis import given
from hypothesis import strategies as st

from carpool.errors import CarpoolError
from carpool.hosts.engine.request_keys import SAMPLES, group_key, mark_samples, samples_of
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.hosts.vllm.arm import _request_processed

tiny.set_environment()
LEVELS = ("request", "prompt", "tenant", "batch")


def params(extra: Any = None, n: int = 1) -> Any:
    return SimpleNamespace(extra_args=extra, n=n)


def marked(extra: Any = None, n: int = 1) -> Any:
    request = SimpleNamespace(sampling_params=params(extra, n))
    mark_samples(request.sampling_params)
    return request.sampling_params


def test_samples_of_one_request_get_a_key_of_their_own() -> None:
    one, other = marked(n=4), marked(n=4)
    assert re.fullmatch("[0-9a-f]{32}", one.extra_args[SAMPLES])
    assert one.extra_args != other.extra_args  # equal requests are no siblings
    assert samples_of(one, "prompt") == samples_of(one, "request") is not None
    assert marked().extra_args is None
    assert marked({"carpool": "off"}).extra_args == {"carpool": "off"}
    mark_samples(None)  # pooling


def test_what_a_client_writes_in_its_place_is_dropped() -> None:
    known = marked(n=4).extra_args[SAMPLES]
    sent = {SAMPLES: known, "carpool_tenant": "a"}
    assert marked(sent).extra_args == {"carpool_tenant": "a"}
    assert marked({SAMPLES: known}).extra_args is None
    again = marked(sent, n=2)
    assert again.extra_args[SAMPLES] != known
    assert sent[SAMPLES] == known  # what the caller holds stays as it is


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_nonsense_is_the_clients_error_for_vllms_server() -> None:
    """Of any other kind of error its server makes a 500 and a traceback in the log."""
    from vllm.exceptions import VLLMClientError

    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"carpool": {"policy": "topk(k=1)"}}))
    with pytest.raises(CarpoolError, match=r'a request says "carpool": \'xshare\(8\)\'; write "off"') as caught:
        _request_processed(processor, SimpleNamespace(sampling_params=params({"carpool": "xshare(8)"})))
    assert isinstance(caught.value, VLLMClientError)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 1.5, True, "", None], ids=repr)
def test_what_is_no_key_is_alone_and_no_error(value: Any) -> None:
    for name, level in itertools.product((SAMPLES, "carpool_prompt", "carpool_tenant"), LEVELS):
        assert group_key(params({name: value}), "prompt", level) is None
        assert group_key(params({name: value}), "tenant", level) is None


@pytest.mark.parametrize(
    ("isolation", "tenants", "together"),
    [
        ("request", (None, None), False), ("prompt", (None, None), False), ("prompt", ("a", "a"), False),
        ("tenant", (None, None), False), ("tenant", ("a", "a"), True), ("tenant", ("a", "b"), False),
        ("tenant", ("a", None), False), ("batch", (None, None), True), ("batch", ("a", "a"), True),
        ("batch", ("a", "b"), False), ("batch", ("a", None), False),
    ],
)  # fmt: skip
def test_a_callers_key_joins_only_who_may_depend_on_each_other_anyway(
    isolation: str, tenants: tuple[Any, Any], together: bool
) -> None:
    given_keys = [
        {"carpool_prompt": "p"} | ({} if tenant is None else {"carpool_tenant": tenant}) for tenant in tenants
    ]
    one, other = (group_key(params(extra), "prompt", isolation) for extra in given_keys)
    assert (one is not None and one == other) == together


def test_a_callers_key_takes_in_all_samples_of_its_requests() -> None:
    asked = [marked({"carpool_prompt": key, "carpool_tenant": "t"}, n=2) for key in ("p", "p", "q")]
    keys = [group_key(one, "prompt", "tenant") for one in asked]
    assert keys[0] == keys[1] != keys[2]
    assert len({group_key(one, "prompt", "prompt") for one in asked}) == 3


KEYS = st.sampled_from(["a", "b", 7, "7", None])


@given(
    st.lists(st.tuples(KEYS, KEYS, st.sampled_from([1, 1, 3])), min_size=2, max_size=8),
    st.sampled_from(LEVELS[1:]),
)
def test_groups_are_nested_and_never_wider_than_the_isolation(sent: list[tuple[Any, Any, int]], isolation: str) -> None:
    """Whoever shares by prompt shares by tenant; strangers (another request, another tenant or none) share only where
    the isolation is `batch`."""
    named = [{"carpool_tenant": tenant, "carpool_prompt": prompt} for tenant, prompt, _ in sent]
    asked = [marked({name: value for name, value in extra.items() if value is not None} or None, n)
             for extra, (_, _, n) in zip(named, sent, strict=True)]  # fmt: skip
    for i, j in itertools.combinations(range(len(asked)), 2):
        by_prompt, by_tenant = (
            [group_key(asked[k], group, isolation) for k in (i, j)] for group in ("prompt", "tenant")
        )
        joined = by_prompt[0] is not None and by_prompt[0] == by_prompt[1]
        kin = by_tenant[0] is not None and by_tenant[0] == by_tenant[1]
        same_tenant = sent[i][0] is not None and (type(sent[i][0]), sent[i][0]) == (type(sent[j][0]), sent[j][0])
        assert kin or not joined
        if isolation == "prompt":
            assert not joined
        if isolation == "tenant":
            assert same_tenant or not joined
            assert kin == same_tenant


EXTRAS = st.sampled_from([None, {"carpool": "off"}, {"carpool_tenant": "a"}, {"carpool_tenant": "b"}, {SAMPLES: "x"}])


@pytest.mark.parametrize("group", LEVELS)
@given(
    extras=st.lists(EXTRAS, min_size=1, max_size=6),
    steps=st.lists(st.lists(st.integers(0, 5), max_size=5, unique=True), max_size=6),
)
def test_requests_that_come_go_and_move_are_read_anew(group: str, extras: list[Any], steps: list[list[int]]) -> None:
    """Buffers that have seen other steps say the same as new ones; equal parameters are no same request."""
    requests = [params(extras[i % len(extras)]) for i in range(6)]
    kept = Rows(16, 6, group, torch.device("cpu"), "batch")
    for chosen in steps:
        new = Rows(16, 6, group, torch.device("cpu"), "batch")
        for rows in (kept, new):
            given = [requests[i] for i in chosen]
            lengths = np.array([1 + i % 2 for i in chosen], np.int64)
            rows.fill(Requests(lengths, np.zeros(len(chosen), bool), given), 12)
        assert kept.sharing == new.sharing
        for ours, theirs in zip(kept.tensors(12), new.tensors(12), strict=True):
            assert torch.equal(ours, theirs)


def test_the_same_requests_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.hosts.engine import step_rows

    read: list[Any] = []
    monkeypatch.setattr(step_rows, "opted_out", lambda given: bool(read.append(given)))
    rows = Rows(8, 4, "batch", torch.device("cpu"))
    requests = [params() for _ in range(3)]
    for step in ([requests] * 3) + [requests[:2], requests]:
        rows.fill(Requests(np.ones(len(step), np.int64), np.zeros(len(step), bool), list(step)), 3)
    assert len(read) == 3 + 2 + 3
