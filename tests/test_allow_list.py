"""Allow lists by hand, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from test_by_hand import chosen, coreset, routed

from carpool import Batch, RouteSpec, parse, route
from carpool.errors import CarpoolError

SCORES = {"easy_ep": torch.tensor([0.5, 0.1, 0.9, 0.2, 0.0, 0.3])}


def test_backfill_and_drop() -> None:
    outcome = routed("allow_list([0, 2])")
    assert coreset(outcome) == {0, 2}
    # 40:15, 35:5, 45:2
    assert chosen(outcome) == [{0: 0.7273, 2: 0.2727}, {2: 0.875, 0: 0.125}, {0: 0.9574, 2: 0.0426}]
    assert chosen(routed("allow_list([2, 0], fill='drop')")) == [{0: 1.0}, {2: 1.0}, {0: 1.0}]


def test_a_row_without_a_listed_expert_gets_its_best_one() -> None:
    assert chosen(routed("allow_list([4], fill='drop')")) == [{4: 1.0}] * 3


def test_highest_scores() -> None:
    assert coreset(routed("allow_list(size=3)", stats=SCORES)) == {0, 2, 5}
    assert coreset(routed("allow_list(size=0.5)", stats=SCORES)) == {0, 2, 5}


def test_scores_of_a_domain() -> None:
    scores = {**SCORES, "easy_ep/code": torch.tensor([0.0, 0.4, 0.0, 0.5, 0.1, 0.0])}
    assert coreset(routed("allow_list(size=2, domain='code')", stats=scores)) == {1, 3}
    assert coreset(routed("allow_list(size=2)", stats=scores)) == {0, 2}
    assert parse("allow_list(size=2, domain='code')").policy.required_stats() == ("easy_ep/code",)


def test_an_expert_outside_the_list_is_never_chosen() -> None:
    """The row's only expert group holds no listed expert, and listed experts rank below others by their bias."""
    spec = RouteSpec(
        top_k=2, scoring="sigmoid", num_groups=2, kept_groups=1, bias_E=torch.tensor([0.0, 0, 0, -9, -9, -9])
    )
    logits_NE = torch.tensor([[3.0, 2.0, 1.0, 0.0, 1.0, 0.0]])
    outcome = route(parse("allow_list([3, 4])"), spec, logits_NE, Batch.of(1))
    assert set(outcome.routing.ids_NK[0].tolist()) == {3, 4}


def test_what_others_read_is_not_free_for_a_token_policy() -> None:
    """The exempt first row reads 0 and 1; the others still keep to the list."""
    exempt_N = torch.tensor([True, False, False])
    outcome = routed("allow_list([3, 4])", given={"exempt_N": exempt_N})
    assert [set(row) for row in chosen(outcome)] == [{0, 1}, {3, 4}, {3, 4}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("allow_list([])", "expert ids"),
        ("allow_list(3)", "expert ids"),
        ("allow_list([-1])", "expert ids"),
        ("allow_list([6])", "expert 6"),
        ("allow_list([1], size=2)", "not both"),
        ("allow_list()", "one of them"),
        ("allow_list([1], domain='code')", "together with size"),
        ("allow_list(size=2, domain=3)", "name of a domain"),
        ("allow_list(size=7)", "size=7"),
        ("allow_list([1], fill='skip')", "fill='skip'"),
    ],
)
def test_impossible_parameters(text: str, words: str) -> None:
    with pytest.raises(CarpoolError, match=words):
        parse(text).check(6, 2)
