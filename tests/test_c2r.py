"""C2R by hand, and its bounds."""

from __future__ import annotations

import pytest
import torch
from test_by_hand import NATIVE, P_NE, chosen

from carpool import Batch, CarpoolError, Outcome, RouteSpec, parse, route

TOGETHER = torch.zeros(6, 6, dtype=torch.int64)  # tokens that choose two of six experts
for one, other, count in ((0, 4, 9), (0, 1, 7), (2, 3, 5)):
    TOGETHER[one, other] = TOGETHER[other, one] = count


def routed(text: str) -> Outcome:
    plan = parse(text)
    plan.check(6, 2)
    return route(plan, RouteSpec(top_k=2), P_NE.log(), Batch.of(3), stats=plan.prepare({"coactivation": TOGETHER}))


def test_the_best_expert_chooses_its_company() -> None:
    """Best experts 0, 2, 0, whose first partners are 4, 3, 4, and whose second ones 1, 0, 1."""
    # 40:6, native, 45:10
    assert chosen(routed("c2r(partners=1)")) == [{0: 0.8696, 4: 0.1304}, NATIVE[1], {0: 0.8182, 4: 0.1818}]
    # native, native, 45:10
    assert chosen(routed("c2r(partners=2)")) == [NATIVE[0], NATIVE[1], {0: 0.8182, 4: 0.1818}]
    assert chosen(routed("c2r(partners=5)")) == NATIVE


def test_numbers_that_leave_too_few_or_nothing_out_are_refused() -> None:
    for partners in (0, 6):
        with pytest.raises(CarpoolError, match=f"partners={partners}: a token's best expert needs 1 to 5"):
            parse(f"c2r({partners})").check(6, 2)
    with pytest.raises(CarpoolError, match="give a number of experts"):
        parse("c2r(0.5)")
    with pytest.raises(CarpoolError, match="coactivation of shape"):
        parse("c2r(2)").prepare({"coactivation": torch.zeros(6, 5)})
