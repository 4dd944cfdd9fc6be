"""Which tokens fit a surrogate and which measure it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_surrogates_in_models import Bent, sums

from carpool.calibrate.capture import Seen
from carpool.calibrate.surrogate_fit import LEAST_HELD, LEAST_TOKENS, SurrogateFit, solve
from carpool.experts.surrogates import Surrogates


@torch.no_grad()
def test_held_out_tokens_measure_and_do_not_fit() -> None:
    """The map is that of the tokens that are not held out, and energy and error are those of the others."""
    E, H, rank, rows = 2, 8, 2, 640
    layer: Any = SimpleNamespace(index=0, num_experts=E, weight_EH=torch.zeros(E, H), experts=Bent(E, H))
    hidden_NH = torch.randn(rows, H, generator=torch.Generator().manual_seed(0))
    held_N = torch.arange(rows) // 64 % 5 == 1
    hidden_NH[held_N] = 1.5 * hidden_NH[held_N] + 0.5  # tokens of another kind, so that it shows who is fitted
    ids_NK = (torch.arange(rows) % E).unsqueeze(-1)
    ones_N1 = torch.ones(rows, 1)
    outputs_NEH = torch.stack([layer.experts(hidden_NH, torch.full((rows, 1), e), ones_N1) for e in range(E)], 1)
    fit = SurrogateFit(layer, rank, stored="fp32")
    for at in (slice(0, 100), slice(100, 101), slice(101, None)):
        part_NH = hidden_NH[at]
        zero_N = torch.zeros(len(part_NH), dtype=torch.int64)
        fit.update(Seen(part_NH, outputs_NEH[at].double(), ids_NK[at], ones_N1[at], None, zero_N, held_N[at]))
    made = fit.result()
    found = Surrogates.of(made)
    for expert in range(E):
        own_N = ids_NK[:, 0] == expert
        fitted_N, measured_N = own_N & ~held_N, own_N & held_N
        assert fitted_N.sum() >= LEAST_TOKENS
        inner_RH, outer_XH = solve(*sums(hidden_NH[fitted_N], outputs_NEH[fitted_N, expert]), rank)
        x_CH, y_CH = hidden_NH[measured_N], outputs_NEH[measured_N, expert]
        direct_CH = x_CH @ inner_RH.T.float() @ outer_XH[:-1].float() + outer_XH[-1].float()
        one_C1 = torch.ones(len(x_CH), 1)
        torch.testing.assert_close(
            found(x_CH, torch.full((len(x_CH), 1), expert), one_C1), direct_CH, rtol=1e-3, atol=1e-3
        )
        energy, error = y_CH.square().sum(), (y_CH - direct_CH).square().sum()
        torch.testing.assert_close(made["surrogate_energy"][expert], energy / len(x_CH))
        share = error / energy
        assert 0.1 < share < 0.9
        torch.testing.assert_close(made["surrogate_unexplained"][expert], share, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("fitted", "held", "trusted"), [
    (LEAST_TOKENS, LEAST_HELD, True), (LEAST_TOKENS - 1, LEAST_HELD, False), (LEAST_TOKENS, LEAST_HELD - 1, False),
])  # fmt: skip
def test_an_expert_with_too_few_tokens_of_either_kind_is_not_trusted(fitted: int, held: int, trusted: bool) -> None:
    E, H, rows = 2, 8, fitted + held
    layer: Any = SimpleNamespace(index=0, num_experts=E, weight_EH=torch.zeros(E, H), experts=Bent(E, H))
    hidden_NH = torch.randn(rows, H, generator=torch.Generator().manual_seed(0))
    zero_N, ones_N1 = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, 1)
    outputs_NEH = torch.stack([layer.experts(hidden_NH, torch.full((rows, 1), e), ones_N1) for e in range(E)], 1)
    fit = SurrogateFit(layer, 2, stored="fp32")
    fit.update(Seen(hidden_NH, outputs_NEH, zero_N.unsqueeze(1), ones_N1, None, zero_N, torch.arange(rows) >= fitted))
    share_E = fit.result()["surrogate_unexplained"]
    assert (float(share_E[0]) < 1) == trusted
    assert float(share_E[1]) == 1, "no token routes to it"
