"""Numbers of experts: shares of them in exact decimal arithmetic, and tensors that hold a number and no share."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from carpool import Batch, RouteSpec, parse, route
from carpool.errors import CarpoolError
from carpool.policies import (
    BASE,
    OEA,
    DESVote,
    Lynx,
    Policy,
    RandomCoreset,
    Surrogate,
    TopK,
    XShare,
    XShareExpertParallel,
    XShareSpeculative,
)
from carpool.policies.parameters import resolve_budget


@pytest.mark.parametrize("places", [1, 2])
def test_a_share_is_what_its_decimals_say(places: int) -> None:
    """0.29 of 100 experts are 29, though 0.29 * 100 is a little less in binary."""
    for size in range(8, 513):
        for part in range(1, 10**places + 1):
            share = Decimal(part) / 10**places
            if share * size >= 1:
                assert resolve_budget("budget", float(share), size) == int(share * size), f"{share} of {size}"


def test_a_share_of_a_devices_experts_is_what_its_decimals_say() -> None:
    """100 experts on each of two devices."""
    batch = Batch.of(64, device_E=torch.arange(200) % 2)
    logits_NE = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    for share in ("0.29", "0.53", "0.59", "0.07"):
        plan = parse(f"xshare_expert_parallel({share}, warmup=0)")
        coreset_GE = route(plan, RouteSpec(top_k=8), logits_NE, batch).coreset_GE
        assert coreset_GE.sum() == 2 * int(Decimal(share) * 100)


def test_a_third_of_the_experts() -> None:
    assert resolve_budget("budget", 1 / 3, 96) == 32
    assert resolve_budget("budget", 2 / 3, 96) == 64


SHARE, HALF = torch.tensor(0.5), torch.tensor(8.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda number: XShare(number),
        lambda number: XShare(4, warmup=number),
        lambda number: TopK(number),
        lambda number: OEA(number),
        lambda number: DESVote(size=number),
        lambda number: Lynx(number),
        lambda number: BASE(number),
        lambda number: Surrogate(number),
        lambda number: RandomCoreset(number),
        lambda number: RandomCoreset(4, warmup=number),
        lambda number: XShareSpeculative(8, number),
        lambda number: XShareSpeculative(number, 2),
        lambda number: XShareExpertParallel(number),
    ],
)
@pytest.mark.parametrize("number", [SHARE, HALF, torch.tensor([4]), torch.tensor(True)], ids=str)
def test_a_tensor_is_a_number_of_experts(make, number: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """A share in a tensor was compared with ranks: a coreset of one expert, in silence."""

    def checked() -> None:
        policy: Policy = make(number)
        policy.check(16, 4)

    with pytest.raises(CarpoolError, match="a tensor holds a number of experts"):
        checked()


def test_a_tensor_that_nobody_checked_is_refused_where_it_is_used() -> None:
    plan = parse("xshare(4)")
    object.__setattr__(plan.policy, "budget", SHARE)
    with pytest.raises(CarpoolError, match="a tensor holds a number of experts"):
        route(plan, RouteSpec(top_k=2), torch.randn(4, 16), Batch.of(4))
