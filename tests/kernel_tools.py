"""The two launches beside the operations that they replace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from harness import Trial, a_host, hidden
from torch import Tensor

from carpool import Outcome, Routing
from carpool.kernels.launch import Fused, Scratch
from carpool.plans.counters import FIELDS, SHARES, measured
from carpool.plans.pipeline import decide, scored

ULPS = 4


def both(trial: Trial, native: Routing | None = None, plan: Any = None, **how: Any) -> tuple[Routing, Tensor, Outcome]:
    """The kernels' routing and counters, and the outcome of the general path, from the same scores."""
    case, plan = trial.case, plan or trial.plan
    native = a_host(case) if native is None else native
    stats = plan.prepare(trial.stats())
    scores = scored(case.spec, case.logits_NE)
    hidden_NH = hidden(case) if trial.row.hidden else None
    outcome = decide(
        plan, case.spec, case.logits_NE, *scores, case.batch, native=native, stats=stats,
        hidden_NH=hidden_NH,
    )  # fmt: skip
    batch = case.batch
    scratch = Scratch(max(1, case.rows), batch.num_groups, case.experts, "cpu", batch.num_steps)
    fused = Fused(plan, case.spec, case.experts, stats, scratch)
    totals_F = torch.zeros(len(FIELDS), dtype=torch.float64)
    energy_NE = plan.policy.energy_NE(hidden_NH, stats) if hidden_NH is not None else None
    routing = fused(case.logits_NE, native, batch, totals_F, scores=scores, energy_NE=energy_NE, **how)
    left = [name for name, value in vars(scratch).items() if isinstance(value, Tensor) and value.any()]
    assert set(left) <= {"state_N", "scores_NE", "weights_NE"}, f"the launches leave {left} behind"
    return routing, totals_F, outcome


def assert_agree(trial: Trial, **how: Any) -> None:
    """The same experts, weights within a few ulp and bit for bit where a row is unchanged, the same counters."""
    routing, totals_F, outcome = both(trial, **how)
    theirs = outcome.routing
    assert torch.equal(routing.ids_NK, theirs.ids_NK)
    assert routing.ids_NK.dtype == theirs.ids_NK.dtype
    assert_close(routing.weights_NK, theirs.weights_NK)
    assert torch.equal(routing.weights_NK[~outcome.changed_N], theirs.weights_NK[~outcome.changed_N])
    assert (routing.surrogate_ids_NK is None) == (theirs.surrogate_ids_NK is None)
    if routing.surrogate_ids_NK is not None:
        used_NK = theirs.surrogate_weights_NK != 0
        assert torch.equal(routing.surrogate_ids_NK[used_NK], theirs.surrogate_ids_NK[used_NK].int())
        assert_close(routing.surrogate_weights_NK, theirs.surrogate_weights_NK)
    expected_F = measured(trial.case.batch, outcome)
    shares = [FIELDS.index(name) for name in SHARES]
    torch.testing.assert_close(totals_F[shares], expected_F[shares], rtol=0, atol=1e-9 * max(1, trial.case.rows))
    totals_F[shares] = expected_F[shares] = 0
    assert dict(zip(FIELDS, totals_F.tolist(), strict=True)) == dict(zip(FIELDS, expected_F.tolist(), strict=True))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ulps(ours, theirs) <= ULPS


def ulps(one: Tensor, other: Tensor) -> int:
    """The largest distance in units of the last place, of non-negative numbers of 16 or 32 bits."""
    whole = torch.int32 if one.dtype == torch.float32 else torch.int16
    if not one.numel():
        return 0
    return int((one.contiguous().view(whole).long() - other.contiguous().view(whole).long()).abs().max())


def with_guards(trial: Trial, guards: tuple[Any, ...]) -> Trial:
    return replace(trial, plan=replace(trial.plan, guards=guards))
