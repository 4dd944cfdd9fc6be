"""The random control draws evenly and anew: for every group, layer, step and seed, whatever the routers' scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from carpool import Batch, Outcome, RouteSpec, parse, route

G, ROWS, E, K = 1500, 6, 16, 8


def within(statistic: float, freedom: int) -> bool:
    """Whether a chi-square statistic lies within four standard deviations (and a little, for its tail)."""
    return statistic < freedom + 4 * math.sqrt(2 * freedom) + 8


def logits(layer: int, kind: str = "normal") -> Tensor:
    """Of `G` groups of rows, `[G * ROWS, E]`; every expert is picked by some row of every group."""
    generator = torch.Generator().manual_seed(layer)
    logits_NE = torch.randn(G * ROWS, E, generator=generator) * (4 if kind == "peaked" else 1)
    # the first two rows of a group pick all experts between them
    order_GE = torch.rand(G, E, generator=generator).argsort(-1)
    lift_GE = torch.zeros(G, E).scatter(-1, order_GE[:, :K], 30.0 if kind == "peaked" else 8.0)
    logits_NE[::ROWS] += lift_GE
    logits_NE[1::ROWS] += lift_GE.amax() - lift_GE
    return logits_NE.bfloat16().float() if kind == "bf16" else logits_NE


def routed(text: str, logits_NE: Tensor, scoring: str = "softmax") -> Outcome:
    group_N = torch.arange(G).repeat_interleave(ROWS)
    spec = RouteSpec(top_k=K, scoring=scoring)  # type: ignore[arg-type]
    return route(parse(text), spec, logits_NE, Batch.of(G * ROWS, group_N=group_N, num_groups=G))


def drawn(text: str, logits_NE: Tensor, scoring: str = "softmax") -> Tensor:
    """What the control chose, `[G, E]` float64."""
    return routed(text, logits_NE, scoring).coreset_GE.double()


def assert_independent(one_GE: Tensor, other_GE: Tensor, size: int) -> None:
    """How often two draws hold a pair of experts, one of each: all pairs alike."""
    chance = (size / E) ** 2
    seen_EE = one_GE.T @ other_GE
    statistic = float(((seen_EE - G * chance) ** 2 / (G * chance * (1 - chance))).sum())
    assert within(statistic, E * E)
    overlap = float((one_GE * other_GE).sum()) / G
    spread = size**2 * (E - size) ** 2 / (E**2 * (E - 1))  # hypergeometric
    assert abs(overlap - size**2 / E) < 4 * math.sqrt(spread / G)


@pytest.mark.parametrize("kind", ["normal", "peaked", "bf16"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_every_expert_is_as_likely(kind: str, scoring: str) -> None:
    """The experts, pairs of them, and the experts by their mass: chi-square over groups."""
    size, logits_NE = 5, logits(1, kind)
    coreset_GE = drawn(f"random({size}, warmup=0)", logits_NE, scoring)
    assert (coreset_GE.sum(-1) == size).all()
    chance, pair = size / E, size * (size - 1) / (E * (E - 1))
    weight_GE = RouteSpec(top_k=K, scoring=scoring).scores(logits_NE)[1].view(G, ROWS, E).sum(1)  # type: ignore[arg-type]
    by_mass_GE = coreset_GE.gather(-1, weight_GE.argsort(-1))
    for chosen_GE in (coreset_GE, by_mass_GE):
        assert within(float(((chosen_GE.sum(0) - G * chance) ** 2 / (G * chance * (1 - chance))).sum()), E - 1)
    seen_EE = (coreset_GE.T @ coreset_GE)[tuple(torch.triu_indices(E, E, 1))]
    assert within(float(((seen_EE - G * pair) ** 2 / (G * pair * (1 - pair))).sum()), E * (E - 1) // 2)


@pytest.mark.parametrize("kind", ["normal", "peaked", "bf16"])
def test_every_group_has_a_draw_of_its_own(kind: str) -> None:
    """12,870 sets of 8 of 16 experts: 1,500 draws hold about 1,415 different ones."""
    sets = {tuple(row) for row in drawn("random(8, warmup=0)", logits(2, kind)).tolist()}
    assert len(sets) > 1370


def test_layers_steps_and_seeds_are_independent() -> None:
    size = 5
    first_GE = drawn(f"random({size}, warmup=0)", logits(3))
    assert_independent(first_GE, drawn(f"random({size}, warmup=0)", logits(4)), size)
    assert_independent(first_GE, drawn(f"random({size}, warmup=0, seed=1)", logits(3)), size)
    assert_independent(first_GE, first_GE.roll(1, 0), size)  # one group and the next


def test_the_least_change_draws_anew() -> None:
    """Two columns move by a few parts in ten million, and their sum stays."""
    size, before_NE = 5, logits(5)
    after_NE = before_NE.clone()
    after_NE[2::ROWS, 3] += 1e-5
    assert_independent(
        drawn(f"random({size}, warmup=0)", before_NE), drawn(f"random({size}, warmup=0)", after_NE), size
    )


def test_it_keeps_every_rows_best() -> None:
    """The rest of the budget is drawn from what else is natively picked, evenly; a small budget is what is kept."""
    size, logits_NE = 9, logits(6)
    outcome = routed(f"random({size})", logits_NE)
    best_GE = torch.zeros(G, E).index_put_(
        (torch.arange(G).repeat_interleave(ROWS), logits_NE.argmax(-1)), torch.ones(G * ROWS)
    )
    assert (outcome.coreset_GE >= best_GE.bool()).all()
    assert (outcome.coreset_GE.sum(-1) == size).all()
    rest_GE = 1 - best_GE
    chance_GE = rest_GE * (size - best_GE.sum(-1, keepdim=True)) / rest_GE.sum(-1, keepdim=True)
    expected_E, spread_E = chance_GE.sum(0), (chance_GE * (1 - chance_GE)).sum(0)
    seen_E = (outcome.coreset_GE * rest_GE).sum(0)
    assert within(float(((seen_E - expected_E) ** 2 / spread_E).sum()), E - 1)
    assert torch.equal(drawn("random(1)", logits_NE), best_GE.double())
