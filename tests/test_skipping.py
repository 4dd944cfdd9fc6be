"""The three skipping rules by hand, as prefixes of one list, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases
from test_by_hand import NATIVE, chosen, routed

from carpool import Batch, Outcome, RouteSpec, parse, route
from carpool.errors import CarpoolError

HALF = {"sensitivity": torch.tensor(0.5)}


def test_top_p_keeps_native_weights_or_renormalises() -> None:
    """Best probabilities .40, .35, .45: only the second row needs its second expert to pass .38."""
    assert chosen(routed("top_p(0.38)")) == [{0: 0.5714}, NATIVE[1], {0: 0.6}]
    assert chosen(routed("top_p(0.38, renormalize=True)")) == [{0: 1.0}, NATIVE[1], {0: 1.0}]
    assert chosen(routed("top_p(0)")) == [{0: 0.5714}, {2: 0.5385}, {0: 0.6}]


def test_tail_mass() -> None:
    """The second expert's share is 3/7, 30/65 and 0.4."""
    assert chosen(routed("tail_mass(0.41)")) == [NATIVE[0], NATIVE[1], {0: 1.0}]
    assert chosen(routed("tail_mass(0.44, renormalize=False)")) == [{0: 0.5714}, NATIVE[1], {0: 0.6}]


def test_tail_mass_of_two_experts_is_the_papers_ratio_rule() -> None:
    """Skip the second iff w2 < b w1: ratios .75, .857, .667."""
    b = 0.7
    assert chosen(routed(f"tail_mass({b / (1 + b)})")) == [NATIVE[0], NATIVE[1], {0: 1.0}]


def test_layer_threshold_weighs_the_layer() -> None:
    """Half of the shares 3/7, 30/65, 0.4 is .214, .231, .2."""
    assert chosen(routed("layer_threshold(0.21)", stats=HALF)) == [NATIVE[0], NATIVE[1], {0: 0.6}]
    assert chosen(routed("layer_threshold(0.22, renormalize=True)", stats=HALF)) == [{0: 1.0}, NATIVE[1], {0: 1.0}]
    never = {"sensitivity": torch.tensor(0.0)}
    assert [len(row) for row in chosen(routed("layer_threshold(0.01)", stats=never))] == [1, 1, 1]


def routed_case(text: str, case: Case) -> Outcome:
    plan = parse(text)
    return route(plan, case.spec, case.logits_NE, case.batch, stats=plan.policy.prepare(HALF))


@pytest.mark.parametrize("name", ["top_p(p", "tail_mass(beta", "layer_threshold(tau"])
@given(case=cases(), lower=st.floats(0, 1), upper=st.floats(0, 1))
def test_a_stricter_setting_skips_more_and_from_the_end(name: str, case: Case, lower: float, upper: float) -> None:
    lower, upper = sorted((lower, upper))
    loose, strict = (lower, upper) if name != "top_p(p" else (upper, lower)
    more, fewer = (routed_case(f"{name}={value})", case) for value in (loose, strict))
    kept_NE = fewer.allowed_NE & fewer.inputs.native_NE
    assert (kept_NE <= more.allowed_NE).all()
    assert kept_NE.any(-1).all()
    weight_NE = fewer.inputs.weights_NE if name == "top_p(p" else fewer.inputs.native_weight_NE
    lightest_N = weight_NE.masked_fill(~kept_NE, torch.inf).amin(-1)
    skipped_NE = fewer.inputs.native_NE & ~kept_NE
    assert (weight_NE.masked_fill(~skipped_NE, 0).amax(-1) <= lightest_N).all()


@given(case=cases(patterns=("normal", "quantised"), dtypes=(torch.float32,)), beta=st.floats(0, 1))
def test_tail_mass_displaces_less_than_beta(case: Case, beta: float) -> None:
    """Also where a model scales the weight of each expert (Gemma)."""
    scale_E = torch.rand(case.experts, generator=case.generator()) * 4
    for spec in (replace(case.spec, per_expert_scale_E=None), replace(case.spec, per_expert_scale_E=scale_E)):
        outcome = routed_case(f"tail_mass(beta={beta})", replace(case, spec=spec))
        assert (outcome.displaced_N <= beta + 1e-5).all()


def test_an_experts_scale_is_part_of_its_weight() -> None:
    """Expert 1 is picked second, and weighs three times as much as the best: nobody skips it."""
    spec = RouteSpec(top_k=2, per_expert_scale_E=torch.tensor([0.5, 2.0, 1.0, 1.0]))
    logits_NE = torch.tensor([[0.5, 0.375, 0.0625, 0.0625]]).log()  # native weights 0.25 and 0.75
    for text in ("tail_mass(0.3)", "layer_threshold(0.2)"):
        plan = parse(text)
        outcome = route(plan, spec, logits_NE, Batch.of(1), stats=plan.policy.prepare(HALF))
        assert set(outcome.routing.ids_NK[0].tolist()) == {1}, text
        assert outcome.displaced_N.tolist() == pytest.approx([0.25])


@pytest.mark.parametrize("text", ["top_p(1.1)", "top_p(-0.1)", "tail_mass('a')", "tail_mass(2)", "layer_threshold(-1)"])
def test_impossible_parameters(text: str) -> None:
    with pytest.raises(CarpoolError, match="give a"):
        parse(text)


def test_a_sensitivity_per_expert_is_refused() -> None:
    with pytest.raises(CarpoolError, match="sensitivity"):
        parse("layer_threshold(0.1)").policy.prepare({"sensitivity": torch.ones(6)})
