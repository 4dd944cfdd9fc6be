"""`benchmarks/unnormalised_mass.py`: the two ways to mix after sharing, by hand."""

from __future__ import annotations

import pytest
from test_benchmarks_vllm import script
from test_by_hand import P_NE

from carpool import Batch, Plan, RouteSpec, parse, route


@pytest.mark.parametrize("renormalize", [True, False])
def test_masses(renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`oea(1)` gives everybody experts 0 and 2: 0.40 + 0.15 of 0.70, 0.05 + 0.35 of 0.65, 0.45 + 0.02 of 0.75."""
    benchmark = script("unnormalised_mass", monkeypatch)
    spec = RouteSpec(top_k=2, renormalize=renormalize)
    native_N = [1.0, 1.0, 1.0] if renormalize else [0.70, 0.65, 0.75]
    shares = {"kept": [0.55 / 0.70, 0.40 / 0.65, 0.47 / 0.75], "rescaled": [1.0, 1.0, 1.0]}
    for mass, share_N in shares.items():
        plan = Plan(benchmark.with_mass(parse("oea(1)").policy, mass))
        routing = route(plan, spec, P_NE.log(), Batch.of(3)).routing
        expected = [share * native for share, native in zip(share_N, native_N, strict=True)]
        assert routing.weights_NK.sum(-1).tolist() == pytest.approx(expected)
        ratio_N = [15 / 40, 5 / 35, 2 / 45]  # the second expert over the best, whatever the sum
        assert (routing.weights_NK[:, 1] / routing.weights_NK[:, 0]).tolist() == pytest.approx(ratio_N)
