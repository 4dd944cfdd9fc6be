"""CONTRIBUTING's policy works as it is pasted."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool import Batch, RouteSpec, parse, route
from carpool.cli.catalogue import card_of
from carpool.policies import policies, registry

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


@pytest.fixture
def loudest(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (snippet,) = re.findall(r"^   ```python\n(.*?)^   ```$", TEXT, re.M | re.S)
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    module = ModuleType("loudest")
    monkeypatch.setitem(sys.modules, "loudest", module)  # where dataclasses look up what annotations name
    exec(textwrap.dedent(snippet), module.__dict__)
    return module


def test_the_snippet_is_a_policy(loudest: ModuleType) -> None:
    assert policies()["loudest"] is loudest.Loudest
    card = card_of(loudest.Loudest)
    assert set(card.told) == set(card.parameters) == {"budget"}
    assert parse(card.example).policy.name == "loudest"


def test_it_chooses_by_the_largest_single_weight(loudest: ModuleType) -> None:
    """Against a loop; a group's voters alone, in any order of the rows."""
    generator = torch.Generator().manual_seed(0)
    logits_NE, spec = torch.randn(12, 8, generator=generator), RouteSpec(top_k=2)
    voter_N = torch.arange(12) % 4 > 0
    batch = Batch.of(12, group_N=torch.arange(12) % 2, num_groups=2, exempt_N=~voter_N)
    outcome = route(parse("loudest(budget=3)"), spec, logits_NE, batch)
    weights_NE = logits_NE.softmax(-1)
    for group in range(2):
        rows = [row for row in range(12) if row % 2 == group and voter_N[row]]
        exempt = [row for row in range(12) if row % 2 == group and not voter_N[row]]
        free = {int(e) for row in exempt for e in logits_NE[row].topk(2).indices}
        loudest_first = sorted(
            (e for e in range(8) if e not in free), key=lambda e: -max(float(weights_NE[row, e]) for row in rows)
        )
        assert set(outcome.coreset_GE[group].nonzero().flatten().tolist()) == set(loudest_first[:3]) | free
    order = torch.randperm(12, generator=generator)
    moved = Batch.of(12, group_N=batch.group_N[order], num_groups=2, exempt_N=~voter_N[order])
    again = route(parse("loudest(budget=3)"), spec, logits_NE[order], moved)
    assert torch.equal(again.routing.ids_NK, outcome.routing.ids_NK[order])


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40)), min_size=1, max_size=12))
def test_a_maximum_per_group(groups: int, rows: list[tuple[int, int]]) -> None:
    group_N = torch.tensor([group % groups for group, _ in rows])
    batch = Batch.of(len(rows), group_N=group_N, num_groups=groups)
    found_GX = batch.group_max(torch.tensor([[value, 1] for _, value in rows]))
    for group in range(groups):
        own = [value for place, (_, value) in enumerate(rows) if group_N[place] == group]
        assert found_GX[group].tolist() == [max([0, *own]), int(bool(own))]
