"""What a description is held to: a router's own experts outside ties, and its weights up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import specs
from torch import Tensor

from carpool import CarpoolError, RouteSpec
from carpool.routing.conformance import TOLERANCE, compare
from carpool.routing.lazy import lazy_property
from carpool.routing.spec import Routing

SPEC = RouteSpec(top_k=2)


def logits(rows: int = 5, experts: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))


@given(data=st.data())
def test_a_rule_conforms_to_itself(data: st.DataObject) -> None:
    spec = data.draw(specs(8))
    logits_NE = logits(seed=data.draw(st.integers(0, 99)))
    compare(spec, logits_NE, spec.native(logits_NE), "layer 0")
    ids_NK, weights_NK = spec.native(logits_NE).ids_NK, spec.native(logits_NE).weights_NK
    compare(spec, logits_NE, Routing(ids_NK.flip(-1), weights_NK.flip(-1)), "in another order")


def test_other_experts_are_refused() -> None:
    logits_NE = logits()
    best_NK = logits_NE.topk(3).indices.int()
    swapped_NK = best_NK[:, :2].clone()
    swapped_NK[1] = best_NK[1, [0, 2]]
    weights_NK = SPEC.mix(logits_NE.softmax(-1), swapped_NK, torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(CarpoolError, match=r"layer 3 picks other experts .* \(1 of 5 rows\)"):
        compare(SPEC, logits_NE, Routing(swapped_NK, weights_NK), "layer 3")
    with pytest.raises(CarpoolError, match="picks 3 experts a row, not the 2 of its rule"):
        compare(SPEC, logits_NE, replace(SPEC, top_k=3).native(logits_NE), "layer 3")


def test_ties_may_go_either_way() -> None:
    tied_NE = torch.tensor([[1.0, 0.5, 0.5, -1.0]])
    weights_NK = SPEC.native(tied_NE).weights_NK
    for second in (1, 2):
        compare(SPEC, tied_NE, Routing(torch.tensor([[0, second]]), weights_NK), "layer 0")
    apart_NE = torch.tensor([[1.0, 0.5, 0.501, -1.0]])
    with pytest.raises(CarpoolError, match="other experts"):
        compare(SPEC, apart_NE, Routing(torch.tensor([[0, 1]]), weights_NK), "layer 0")


def test_expert_groups_that_tie_at_the_limit_may_go_either_way() -> None:
    spec = RouteSpec(top_k=2, num_groups=2, kept_groups=1)
    other = Routing(torch.tensor([[2, 3]]), torch.tensor([[0.7311, 0.2689]]))
    compare(spec, torch.tensor([[2.0, 1.0, 2.0, 1.0]]), other, "layer 0")
    with pytest.raises(CarpoolError, match="other experts"):
        compare(spec, torch.tensor([[2.01, 1.0, 2.0, 1.0]]), other, "layer 0")


def scaled(logits_NE: Tensor, factor: float) -> Routing:
    """The rule's own experts; the lighter weight of the last row is off."""
    native = SPEC.native(logits_NE)
    weights_NK = native.weights_NK.clone()
    weights_NK[-1, 1] += factor * weights_NK[-1, 0]
    return Routing(native.ids_NK, weights_NK)


def test_weights_agree_up_to_a_share_of_the_rows_largest() -> None:
    logits_NE = logits()
    compare(SPEC, logits_NE, scaled(logits_NE, 0.8 * TOLERANCE), "layer 0")
    for factor in (1.2 * TOLERANCE, -1.2 * TOLERANCE, 0.1):
        with pytest.raises(CarpoolError, match="layer 0 weighs experts otherwise than its rule"):
            compare(SPEC, logits_NE, scaled(logits_NE, factor), "layer 0")
    # the share is of the weights as the model scales them
    large = RouteSpec(top_k=2, scaling=100.0)
    native = scaled(logits_NE, 0.8 * TOLERANCE)
    compare(large, logits_NE, Routing(native.ids_NK, 100 * native.weights_NK), "layer 0")


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_routers_in_16_bits_may_round(where: str) -> None:
    """bfloat16 has 8 bits: errors of 1 % of the largest weight are rounding, 10 % are not."""
    logits_NE = logits().bfloat16()

    def routed(factor: float) -> tuple[Tensor, Routing]:
        theirs = scaled(logits_NE, factor)
        if where == "logits":
            return logits_NE, theirs
        return logits_NE.float(), Routing(theirs.ids_NK, theirs.weights_NK.bfloat16())

    compare(SPEC, *routed(0.01), "layer 0")
    with pytest.raises(CarpoolError, match="weighs experts otherwise"):
        compare(SPEC, *routed(0.1), "layer 0")


def test_rows_that_are_not_finite_say_nothing() -> None:
    logits_NE = logits()
    native = SPEC.native(logits_NE)
    native.weights_NK[2] = torch.nan
    logits_NE[2, 0] = torch.inf
    compare(SPEC, logits_NE, native, "layer 0")
    compare(SPEC, torch.full_like(logits_NE, torch.nan), native, "layer 0")


def test_a_lazy_property_is_computed_once() -> None:
    computed: Iterator[int] = iter(range(10))

    class Once:
        @lazy_property
        def value(self) -> int:
            """What it says."""
            return next(computed)

    one, other = Once(), Once()
    assert [one.value, one.value, other.value, one.value] == [0, 0, 1, 0]
    assert Once.value.__doc__ == "What it says."
