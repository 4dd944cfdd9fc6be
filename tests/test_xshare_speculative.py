"""XShare over requests and batch: by hand, its two limits, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import Case, cases
from test_by_hand import P_NE, coreset, routed

from carpool import Batch, RouteSpec, parse, route
from carpool.errors import CarpoolError
from carpool.plans.pipeline import Outcome

TWO = {"request_N": torch.tensor([0, 0, 1]), "num_requests": 2}


def test_requests_first_then_the_batch() -> None:
    """First request .45 .40 .50 .35 .21 .09, second .45 .05 .02 .08 .10 .30, all .90 .45 .52 .43 .31 .39."""
    ones = "request_budget=1, warmup=0"
    assert coreset(routed(f"xshare_speculative(1, {ones})", given=TWO)) == {0, 2}
    assert coreset(routed(f"xshare_speculative(3, {ones})", given=TWO)) == {0, 1, 2}
    assert coreset(routed(f"xshare_speculative(1, {ones}, merge='prune')", given=TWO)) == {0}
    assert coreset(routed(f"xshare_speculative(3, {ones}, merge='prune')", given=TWO)) == {0, 2}
    twos = "request_budget=2, warmup=0"  # {2, 0} and {0, 5}
    assert coreset(routed(f"xshare_speculative(1, {twos})", given=TWO)) == {0, 2, 5}
    assert coreset(routed(f"xshare_speculative(2, {twos}, merge='prune')", given=TWO)) == {0, 2}


def test_every_rows_best_expert_stays() -> None:
    three = {"request_N": torch.tensor([0, 1, 2]), "num_requests": 3}
    assert coreset(routed("xshare_speculative(1, 1, warmup=2, merge='prune')", given=three)) == {0, 1, 2, 3, 5}


@given(case=cases())
def test_small_requests_leave_xshare(case: Case) -> None:
    """Each row a request, with a set no larger than its warm-up: the top-up is XShare."""
    one_each = case.given_also(request_N=torch.arange(case.rows), num_requests=max(1, case.rows))
    budget = case.experts // 2
    speculative = parse(f"xshare_speculative({budget}, 1, warmup=1)")
    outcome = route(speculative, case.spec, case.logits_NE, one_each.batch)
    flat = route(parse(f"xshare({budget}, warmup=1)"), case.spec, case.logits_NE, case.batch)
    assert torch.equal(outcome.coreset_GE, flat.coreset_GE)


@pytest.mark.parametrize("merge", ["topup", "prune"])
def test_groups_and_requests_are_numbered_however_the_host_likes(merge: str) -> None:
    """An engine numbers both up to the requests that it could hold: sets are made for what is there."""
    logits_NE = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    group_N, request_N = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]), torch.arange(12) // 2
    policy = parse(f"xshare_speculative(6, 3, merge={merge!r})")

    def routed(groups: int, requests: int, factor: int) -> Outcome:
        given = {"group_N": group_N * factor, "num_groups": groups, "exempt_N": torch.arange(12) == 4}
        batch = Batch.of(12, **given, request_N=request_N * factor, num_requests=requests)
        return route(policy, RouteSpec(3), logits_NE, batch)

    few, many = routed(3, 6, 1), routed(9000, 9000, 1500)
    assert few.changed_N.any()
    assert torch.equal(few.routing.ids_NK, many.routing.ids_NK)
    assert torch.equal(few.coreset_GE, many.coreset_GE[[0, 1500, 3000]])
    for group in range(3):  # as alone
        rows_N = group_N == group
        _, alone_N = request_N[rows_N].unique(return_inverse=True)
        batch = Batch.of(len(alone_N), exempt_N=(torch.arange(12) == 4)[rows_N], request_N=alone_N, num_requests=6)
        alone = route(policy, RouteSpec(3), logits_NE[rows_N], batch)
        assert torch.equal(alone.routing.ids_NK, few.routing.ids_NK[rows_N])


def test_without_requests() -> None:
    with pytest.raises(CarpoolError, match="request of each row"):
        route(parse("xshare_speculative(2, 2)"), RouteSpec(2), P_NE.log(), Batch.of(3))
    with pytest.raises(CarpoolError, match="together"):
        Batch.of(3, request_N=torch.arange(3))


@pytest.mark.parametrize("arguments", ["0, 1", "2, 9", "2, 1, warmup=3", "2, 1, merge='both'", "2, 1, warmup=-1"])
def test_impossible_parameters(arguments: str) -> None:
    with pytest.raises(CarpoolError, match=r"budget|warmup|merge"):
        parse(f"xshare_speculative({arguments})").check(6, 2)
