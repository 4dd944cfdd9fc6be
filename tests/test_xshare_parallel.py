"""XShare per device: by hand, the exact optimum under the caps, and what it refuses."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from test_by_hand import P_NE, coreset, routed

from carpool import Batch, RouteSpec, parse, route
from carpool.errors import CarpoolError

TWO = {"device_E": torch.tensor([0, 0, 0, 1, 1, 1])}


def test_each_device_fills_its_own_budget() -> None:
    """Sums .90 .45 .52 | .43 .31 .39; best experts 0, 2, 0."""
    assert coreset(routed("xshare_expert_parallel(1, warmup=0)", given=TWO)) == {0, 3}
    assert coreset(routed("xshare_expert_parallel(2, warmup=0)", given=TWO)) == {0, 2, 3, 5}
    assert coreset(routed("xshare_expert_parallel(1, warmup=1)", given=TWO)) == {0, 2, 3}  # 2 exceeds the cap


def test_a_share_is_of_what_the_device_holds() -> None:
    uneven = {"device_E": torch.tensor([7, 0, 0, 0, 0, 7])}
    assert coreset(routed("xshare_expert_parallel(0.5, warmup=0)", given=uneven)) == {0, 1, 2}  # 1 of 2, 2 of 4
    assert coreset(routed("xshare_expert_parallel(0.1, warmup=0)", given=uneven)) == {0, 2}  # at least one


def test_the_captured_mass_is_the_largest_under_the_caps() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        device_E = torch.randint(0, 3, (8,), generator=generator)
        logits_NE = torch.randn(5, 8, generator=generator)
        batch = Batch.of(5, device_E=device_E)
        chosen_E = route(parse("xshare_expert_parallel(2, warmup=0)"), RouteSpec(2), logits_NE, batch).coreset_GE[0]
        mass_E = logits_NE.softmax(-1).sum(0).double()
        best = 0.0
        for size in range(1, 7):
            for experts in combinations(range(8), size):
                if torch.bincount(device_E[list(experts)]).max() <= 2:
                    best = max(best, float(mass_E[list(experts)].sum()))
        assert torch.bincount(device_E[chosen_E]).max() <= 2
        assert float(mass_E[chosen_E].sum()) == pytest.approx(best)


def test_without_devices() -> None:
    with pytest.raises(CarpoolError, match="device of each expert"):
        route(parse("xshare_expert_parallel(2)"), RouteSpec(2), P_NE.log(), Batch.of(3))


@pytest.mark.parametrize("arguments", ["0", "7", "1.5", "2, warmup=3", "2, warmup=-1"])
def test_impossible_parameters(arguments: str) -> None:
    with pytest.raises(CarpoolError, match=r"budget_per_device|warmup"):
        parse(f"xshare_expert_parallel({arguments})").check(6, 2)
