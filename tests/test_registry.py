"""Names of policies, and policies of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor

from carpool import Batch, CarpoolError, RouteSpec, parse, route
from carpool.policies import Inputs, Policy, policies, policy_class, register, registry


@dataclass(frozen=True)
class FirstExperts(Policy):
    """The first `count` experts."""

    count: int

    name = "first_experts"
    paper = "a test"

    def coreset(self, inputs: Inputs) -> Tensor:
        return (inputs.experts_E < self.count).expand(inputs.batch.num_groups, -1)


@dataclass(frozen=True)
class Misnamed(FirstExperts):
    """Another name than its entry point."""

    name = "misnamed"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points of an imaginary package."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    registry._installed.cache_clear()
    yield points
    registry._installed.cache_clear()


def point(name: str, target: str) -> EntryPoint:
    return EntryPoint(name, f"{__name__}:{target}", "carpool.policies")


def test_a_policy_of_another_package(installed: list[EntryPoint]) -> None:
    installed.append(point("first_experts", "FirstExperts"))
    assert policies()["first_experts"] is FirstExperts
    assert policy_class("first_experts") is FirstExperts
    outcome = route(parse("first_experts(3)"), RouteSpec(top_k=2), torch.arange(8.0).repeat(2, 1), Batch.of(2))
    assert outcome.routing.ids_NK.tolist() == [[2, 1]] * 2


def test_a_policy_that_does_not_load(installed: list[EntryPoint]) -> None:
    installed.append(point("gone", "Gone"))
    with pytest.raises(CarpoolError, match=r"'gone' of 'test_registry:Gone' does not load"):
        policies()


def test_an_entry_point_under_another_name(installed: list[EntryPoint]) -> None:
    installed.append(point("first_experts", "Misnamed"))
    with pytest.raises(CarpoolError, match="'first_experts' gives a policy named 'misnamed'"):
        policies()


def test_unknown_name() -> None:
    with pytest.raises(CarpoolError, match=r"unknown policy 'nope'; known policies: .*oea.*xshare"):
        policy_class("nope")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Not Snake"}, "snake_case"),
        ({"name": None}, "snake_case"),
        ({"paper": ""}, "needs a `paper` and a docstring"),
        ({"__doc__": ""}, "needs a `paper` and a docstring"),
        ({"kind": "both"}, "use 'token' or 'group'"),
        ({"name": "oea"}, "taken by OEA"),
    ],
)
def test_what_register_refuses(installed: list[EntryPoint], fields: dict[str, object], message: str) -> None:
    kind = type("Odd", (FirstExperts,), {"name": "odd", "__doc__": "Odd.", **fields})
    with pytest.raises(CarpoolError, match=message):
        register(kind)


@pytest.mark.parametrize("thing", [int, parse, Policy, "oea"], ids=["class", "function", "Policy", "name"])
def test_only_policies_register(installed: list[EntryPoint], thing: object) -> None:
    with pytest.raises(CarpoolError):
        register(thing)


def test_registering_twice_is_harmless(installed: list[EntryPoint]) -> None:
    assert register(register(FirstExperts)) is FirstExperts


def test_every_policy_says_what_its_identity_is() -> None:
    for policy in policies().values():
        assert policy.__doc__ is not None
        assert "Identity:" in policy.__doc__, f"{policy.__name__} does not document its identity setting"
