"""XShare over requests and batch: by hand, its two limits, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import Case, cases
from test_by_hand import P_NE, coreset, routed

from carpool import Batch, RouteSpec, parse, route
from carpool.errors import CarpoolError

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


def test_without_requests() -> None:
    with pytest.raises(CarpoolError, match="request of each row"):
        route(parse("xshare_speculative(2, 2)"), RouteSpec(2), P_NE.log(), Batch.of(3))
    with pytest.raises(CarpoolError, match="together"):
        Batch.of(3, request_N=torch.arange(3))


@pytest.mark.parametrize("arguments", ["0, 1", "2, 9", "2, 1, warmup=3", "2, 1, merge='both'", "2, 1, warmup=-1"])
def test_impossible_parameters(arguments: str) -> None:
    with pytest.raises(CarpoolError, match=r"budget|warmup|merge"):
        parse(f"xshare_speculative({arguments})").check(6, 2)
