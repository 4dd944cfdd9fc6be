"""ODP by hand, its quantiles against numpy's, and with MC's bit plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_statistics import usual_tokens
from test_by_hand import NATIVE, P_NE, chosen

from carpool import Batch, CarpoolError, Outcome, RouteSpec, parse, route
from carpool.calibrate.token_quantiles import TokenQuantiles

HIDDEN_NH = torch.tensor([[1.0, -2], [3, 4], [-1, 0]])  # L1 norms 3, 7, 1
STATS = {  # the second expert's ratios are .75, .857 and .667; the median of the rank is .8
    "ratio_quantiles": torch.stack([torch.ones(11), torch.linspace(0.6, 1, 11)]),
    "l1_quantiles": torch.linspace(0, 6, 101),
}


def routed(text: str) -> Outcome:
    plan = parse(text)
    stats = plan.prepare(usual_tokens(6, torch.Generator().manual_seed(0)) | STATS)
    return route(plan, RouteSpec(top_k=2), P_NE.log(), Batch.of(3), stats=stats, hidden_NH=HIDDEN_NH)


def test_odp() -> None:
    assert chosen(routed("odp(protect=0)")) == [{0: 1.0}, NATIVE[1], {0: 1.0}]
    assert chosen(routed("odp(0.25, protect=0)")) == [NATIVE[0], NATIVE[1], {0: 1.0}]  # .7
    assert chosen(routed("odp(1.0, protect=0)")) == [{0: 1.0}, {2: 1.0}, {0: 1.0}]


def test_important_tokens_skip_nothing() -> None:
    assert chosen(routed("odp(1.0)")) == [{0: 1.0}, NATIVE[1], {0: 1.0}]  # 5.88: the second row
    assert chosen(routed("odp(1.0, protect=0.6)")) == [NATIVE[0], NATIVE[1], {0: 1.0}]  # 2.4


def test_with_bits_every_expert_has_its_plans() -> None:
    outcome, plan = routed("odp(protect=0, bits=3)"), routed("bit_plan(3)")
    assert chosen(outcome) == [{0: 1.0}, NATIVE[1], {0: 1.0}]
    depth_NK, bits_E = outcome.routing.depth_NK, plan.inputs.stats["bits"]
    assert depth_NK is not None
    assert torch.equal(depth_NK, bits_E[outcome.routing.ids_NK.long()])
    assert routed("odp()").routing.depth_NK is None


@given(tokens=st.integers(1, 60), cut=st.integers(0, 60), seed=st.integers(0, 99))
def test_quantiles_do_not_depend_on_chunks(tokens: int, cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH, weights_NK = (torch.randn(tokens, width, generator=generator) for width in (5, 3))
    weights_NK = weights_NK.softmax(-1)
    found = TokenQuantiles(3)
    for some in (slice(0, cut), slice(cut, None)):
        found.update(hidden_NH[some], weights_NK[some])
    result = found.result()
    expected = np.quantile(hidden_NH.double().abs().sum(-1).numpy(), np.linspace(0, 1, 101))
    np.testing.assert_allclose(result["l1_quantiles"].numpy(), expected, rtol=1e-5)
    assert (result["ratio_quantiles"][0] == 1).all()
    ratios_N = (weights_NK.sort(-1).values[:, 0] / weights_NK.amax(-1)).sort().values
    median = float(ratios_N[-(-tokens * 5 // 10) - 1])
    assert float(result["ratio_quantiles"][2, 5]) == pytest.approx(median, abs=1.1e-3)


@pytest.mark.parametrize(
    ("text", "said"), [("odp(1.5)", "quantile=1.5"), ("odp(protect=-1)", "protect=-1"), ("odp(bits=0)", "bits=0")]
)
def test_what_it_refuses(text: str, said: str) -> None:
    with pytest.raises(CarpoolError, match=said):
        parse(text)


def test_bits_ask_for_planes() -> None:
    plan = parse("odp()")
    assert not plan.reads_depths
    assert "planes_shape" not in plan.required_stats()
    deep = replace(plan, policy=replace(plan.policy, bits=2.5))  # type: ignore[type-var]
    assert deep.reads_depths
    assert "planes_shape" in deep.required_stats()
