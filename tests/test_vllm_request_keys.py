"""Who shares with whom, by what requests say of themselves: siblings are known by who asked, and cannot be joined."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_models as tiny
from hypothesis import given
from hypothesis import strategies as st

from carpool.hosts.vllm.request_keys import SAMPLES, group_key, mark_samples, samples_of

tiny.set_environment()
LEVELS = ("request", "prompt", "tenant", "batch")


def params(extra: Any = None, n: int = 1) -> Any:
    return SimpleNamespace(extra_args=extra, n=n)


def marked(extra: Any = None, n: int = 1) -> Any:
    request = SimpleNamespace(sampling_params=params(extra, n))
    mark_samples(request)
    return request.sampling_params


def test_samples_of_one_request_get_a_key_of_their_own() -> None:
    one, other = marked(n=4), marked(n=4)
    assert re.fullmatch("[0-9a-f]{32}", one.extra_args[SAMPLES])
    assert one.extra_args != other.extra_args  # equal requests are no siblings
    assert samples_of(one, "prompt") == samples_of(one, "request") is not None
    assert marked().extra_args is None
    assert marked({"carpool": "off"}).extra_args == {"carpool": "off"}
    mark_samples(SimpleNamespace(sampling_params=None))  # pooling


def test_what_a_client_writes_in_its_place_is_dropped() -> None:
    known = marked(n=4).extra_args[SAMPLES]
    sent = {SAMPLES: known, "carpool_tenant": "a"}
    assert marked(sent).extra_args == {"carpool_tenant": "a"}
    assert marked({SAMPLES: known}).extra_args is None
    again = marked(sent, n=2)
    assert again.extra_args[SAMPLES] != known
    assert sent[SAMPLES] == known  # what the caller holds stays as it is


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
