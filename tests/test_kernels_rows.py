"""Routing in two launches: who the rows are, what a recorded graph needs, what a plan must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from harness import Trial, a_host
from kernel_tools import assert_agree, assert_close, both
from policies_under_test import ROWS, Row
from strategies import Case

from carpool import Batch, CarpoolError, Plan, RouteSpec, Routing, parse
from carpool.kernels import launch
from carpool.kernels.launch import Fused, Scratch
from carpool.kernels.traits import TRAITS, uncovered
from carpool.plans.counters import FIELDS, measured
from carpool.plans.guards import Floor, MinBatch
from carpool.plans.pipeline import scored
from carpool.policies import Lynx, policy_class
from carpool.routing.spec import Scoring

NAMED = {row.name: row for row in ROWS}
SERVING = " | decode_only | min_batch(2) | short_circuit"
SPEC = RouteSpec(top_k=4)


def trial_of(text: str, rows: int = 6, experts: int = 16, spec: RouteSpec = SPEC, seed: int = 3, **given: Any) -> Trial:
    """Rows with a few prompts, paddings and finished ones among them."""
    plan = parse(text)
    row: Row = NAMED[plan.policy.name]
    logits_NE = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)) * 2
    kind_N = torch.arange(rows) % 7
    known = {"exempt_N": kind_N == 3, "real_N": kind_N != 5, "voter_N": kind_N != 6, **row.extras(rows, experts)}
    return Trial(row, Case(spec, logits_NE, {**known, **given}, seed), plan)


@pytest.mark.parametrize("text", ["xshare(8)", "oea(1)", "lynx(6)", "surrogate(5)", "sere(1)"])
@pytest.mark.parametrize("groups", [1, 3, 12], ids=["batch", "tenant", "request"])
def test_groups(text: str, groups: int) -> None:
    group_N = torch.arange(12) * groups // 12
    assert_agree(trial_of(text + SERVING, rows=12, group_N=group_N, num_groups=groups))


@pytest.mark.parametrize("text", ["xshare(40)", "surrogate(30, warmup=1)", "tail_mass(0.3)"])
def test_the_largest_layer(text: str) -> None:
    assert_agree(trial_of(text + SERVING + " | floor(0.2)", rows=9, experts=512, spec=RouteSpec(top_k=16)))


@pytest.mark.slow
def test_a_thousand_rows() -> None:
    group_N = torch.arange(1024) // 16
    assert_agree(trial_of("xshare(8)" + SERVING, rows=1024, group_N=group_N, num_groups=64))


@pytest.mark.parametrize("guards", ["protect([1, 2]) | short_circuit", "short_circuit | protect([1, 2])"])
@pytest.mark.parametrize("budget", [3, 9, 14, 16])
def test_guards_act_in_their_order(guards: str, budget: int) -> None:
    for seed in range(3):
        assert_agree(trial_of(f"xshare({budget}) | {guards} | min_batch(2)", rows=4, seed=seed))


def test_the_floor_at_its_very_edge() -> None:
    """What is displaced may be exactly `tau`."""
    for tau, kept in ((0.5, 2), (0.49, 3), (0.75, 2), (0.25, 3)):
        trial = trial_of(f"topk(2) | floor({tau})", rows=3)
        level = trial.case.with_logits((torch.arange(16) % 4 == 1).float().expand(3, -1) * 4)
        routing, _, outcome = both(Trial(trial.row, level, trial.plan))
        assert torch.equal(routing.ids_NK, outcome.routing.ids_NK)
        assert (outcome.computed_NE.sum(-1) == kept).all()


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_expert_groups_that_tie(group_score: Any) -> None:
    """Backfill goes to the groups that a row may use: of two that tie, both ways take the same."""
    spec = RouteSpec(top_k=3, num_groups=4, kept_groups=2, group_score=group_score)
    for seed in range(3):
        trial = trial_of("xshare(6, warmup=0)", rows=9, seed=seed, spec=spec)
        assert_agree(Trial(trial.row, trial.case.with_logits(trial.case.logits_NE.div(2).round()), trial.plan))


def test_one_launch_after_another() -> None:
    """The buffers serve all layers and any number of rows: nothing of a call is left for the next."""
    scratch = Scratch(16, 4, 64, "cpu")
    totals_F = torch.zeros(len(FIELDS), dtype=torch.float64)
    for rows, experts in ((16, 64), (3, 16), (9, 64), (1, 16)):
        trial = trial_of("xshare(8) | floor(0.3)", rows, experts, group_N=torch.arange(rows) % 4, num_groups=4)
        outcome = trial.run()
        case = trial.case
        fused = Fused(trial.plan, case.spec, experts, {}, scratch)
        native = case.spec.native(case.logits_NE)
        routing = fused(case.logits_NE, native, case.batch, totals_F, scores=scored(case.spec, case.logits_NE))
        assert torch.equal(routing.ids_NK, outcome.routing.ids_NK)
    assert totals_F[FIELDS.index("calls")] == 4


def test_numbers_that_change_at_run_time() -> None:
    """A recorded graph reads them anew: the same launches follow the tensors."""
    trial = trial_of("xshare(8, warmup=1) | floor(0.5)")
    case, (policy, floor) = trial.case, (trial.plan.policy, trial.plan.guards[0])
    knobs = {name: torch.tensor(getattr(policy, name)) for name in ("budget", "warmup")}
    tau = torch.tensor(floor.tau, dtype=torch.float64)
    fused = Fused(Plan(replace(policy, **knobs), (Floor(tau),)), case.spec, case.experts, {}, Scratch(6, 1, 16, "cpu"))
    for budget, warmup, new_tau in ((8, 1, 0.5), (4, 0, 1.0), (6, 2, 0.05), (16, 1, 0.0)):
        knobs["budget"].fill_(budget), knobs["warmup"].fill_(warmup), tau.fill_(new_tau)
        plan = parse(f"xshare({budget}, warmup={warmup}) | floor({new_tau})")
        native = case.spec.native(case.logits_NE)
        totals_F = torch.zeros(len(FIELDS), dtype=torch.float64)
        routing = fused(case.logits_NE, native, case.batch, totals_F, scores=scored(case.spec, case.logits_NE))
        assert torch.equal(routing.ids_NK, trial.run(plan=plan).routing.ids_NK)


def test_padding_follows_the_first_row() -> None:
    """Rows of padding in a recorded graph read no expert of their own."""
    for text in ("xshare(6)", "surrogate(5)"):
        trial = trial_of(text, rows=8, real_N=torch.arange(8) < 5)
        routing, totals_F, outcome = both(trial, follow=True)
        changed_N = outcome.changed_N
        assert changed_N[0]
        assert torch.equal(routing.ids_NK[:5], outcome.routing.ids_NK[:5])
        assert torch.equal(routing.ids_NK[5:], outcome.routing.ids_NK[:1].expand(3, -1))
        assert torch.equal(routing.weights_NK[5:], outcome.routing.weights_NK[5:])
        if routing.surrogate_weights_NK is not None:
            assert not routing.surrogate_weights_NK[5:].any()
        assert totals_F[FIELDS.index("rows")] == 5
        assert totals_F[FIELDS.index("rows_changed")] == changed_N.sum()


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("-inf")])
def test_padding_hides_no_overflow(follow: bool, value: float) -> None:
    """What the floor adds is counted whatever logits padding holds, in a recorded graph and outside of one."""
    for seed in range(3):
        trial = trial_of("xshare(2, warmup=0) | floor(0.2)", rows=12, real_N=torch.arange(12) < 6, seed=seed)
        logits_NE = trial.case.logits_NE.clone()
        logits_NE[6:, 0] = value
        _, totals_F, _ = both(Trial(trial.row, trial.case.with_logits(logits_NE), trial.plan), follow=follow)
        alone = trial_of("xshare(2, warmup=0) | floor(0.2)", rows=12, seed=seed).case.logits_NE[:6]
        shorter = trial_of("xshare(2, warmup=0) | floor(0.2)", rows=6, real_N=torch.ones(6, dtype=torch.bool))
        _, expected_F, _ = both(Trial(shorter.row, shorter.case.with_logits(alone), shorter.plan))
        place = FIELDS.index("floor_overflow")
        assert totals_F[place] == expected_F[place] > 0


@pytest.mark.parametrize("follow", [False, True])
def test_a_call_without_rows(follow: bool) -> None:
    """Counts as one, as on the general path; in a recorded graph nobody votes in it."""
    trial = trial_of("xshare(4)", rows=0)
    routing, totals_F, outcome = both(trial, follow=follow)
    assert routing.ids_NK.shape == (0, 4)
    expected_F = measured(trial.case.batch, outcome) * (not follow)
    assert totals_F.tolist() == expected_F.tolist()


def test_a_graph_without_voters_counts_nothing() -> None:
    """Warm-up, prompts, switched off: native, uncounted, and padding as the host has it."""
    nobody_N = torch.zeros(6, dtype=torch.bool)
    trial = trial_of("xshare(4)", voter_N=nobody_N, exempt_N=~nobody_N)
    native = a_host(trial.case)
    routing, totals_F, _ = both(trial, native=native, follow=True)
    assert torch.equal(routing.ids_NK, native.ids_NK)
    assert torch.equal(routing.weights_NK, native.weights_NK)
    assert not totals_F.any()


def test_ids_that_mark_padding_stay() -> None:
    trial = trial_of("xshare(4)", rows=8, real_N=torch.arange(8) < 6)
    native = a_host(trial.case)
    native = Routing(native.ids_NK.clone(), native.weights_NK)
    native.ids_NK[6:] = -1
    fused = Fused(trial.plan, SPEC, 16, {}, Scratch(8, 1, 16, "cpu"))
    totals_F = torch.zeros(len(FIELDS), dtype=torch.float64)
    routing = fused(trial.case.logits_NE, native, trial.case.batch, totals_F, follow=True)
    assert (routing.ids_NK[6:] == -1).all()
    assert (routing.ids_NK[:6] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["softmax", "softmax_after_topk", "sigmoid", "sqrtsoftplus", "probabilities"])
def test_scores_of_their_own(scoring: Scoring, dtype: torch.dtype) -> None:
    """The first launch may score: within the last places of what torch gives, and routing follows from its scores."""
    logits_NE = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    logits_NE[0], logits_NE[1] = 40, -40
    logits_NE[2, 3] = torch.nan
    if scoring == "probabilities":
        logits_NE = logits_NE.float().softmax(-1).to(dtype)
    bias_E = torch.linspace(0, 0.1, 24) if scoring == "sigmoid" else None
    narrow = dtype == torch.bfloat16 and bias_E is None
    spec = RouteSpec(top_k=4, scoring=scoring, bias_E=bias_E, score_in_logits_dtype=narrow)
    plan, scratch, batch = parse("xshare(8)"), Scratch(9, 1, 24, "cpu"), Batch.of(9)
    totals_F = torch.zeros(len(FIELDS), dtype=torch.float64)
    native = spec.native(logits_NE.nan_to_num())
    fused = Fused(plan, spec, 24, {}, scratch)
    routing = fused(logits_NE, native, batch, totals_F)
    finite_N = logits_NE.isfinite().all(-1)
    for ours_NE, theirs_NE in zip((scratch.scores_NE, scratch.weights_NE), scored(spec, logits_NE), strict=True):
        theirs_NE = theirs_NE[finite_N]
        torch.testing.assert_close(ours_NE[finite_N].to(theirs_NE.dtype), theirs_NE, rtol=2e-6, atol=1e-30)
    given = tuple(tensor.clone() for tensor in (scratch.scores_NE, scratch.weights_NE))
    again = fused(logits_NE, native, batch, totals_F, scores=given)
    assert torch.equal(routing.ids_NK, again.ids_NK)
    assert_close(routing.weights_NK, again.weights_NK)


class Recorder:
    """In place of a kernel: what was launched, with how many programs."""

    def __init__(self, name: str, launched: list[tuple[str, int]]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args, **kwargs: self.launched.append((self.name, *grid))


def test_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other operation that the device would run: all else allocates."""
    launched: list[tuple[str, int]] = []
    for name in ("vote", "decide"):
        monkeypatch.setattr(launch, name, Recorder(name, launched))
    for text in ("xshare(8)", "surrogate(5)", "sere(1)", "top_p(0.3)", "allow_list(size=4)"):
        trial = trial_of(text + SERVING + " | floor(0.3)")
        stats = trial.plan.policy.prepare(trial.stats())
        fused = Fused(trial.plan, SPEC, 16, stats, Scratch(6, 1, 16, "cpu"))
        native, totals_F = SPEC.native(trial.case.logits_NE), torch.zeros(len(FIELDS), dtype=torch.float64)
        batch = trial.case.batch
        launched.clear()
        with torch.profiler.profile() as profile:
            fused(trial.case.logits_NE, native, batch, totals_F)
        assert launched == [("vote", 6), ("decide", 6)]
        operations = {event.key for event in profile.key_averages()}
        assert operations <= {"aten::empty_like", "aten::empty_strided", "aten::empty"}, text


def test_every_policy_is_covered_or_says_why() -> None:
    for row in ROWS:
        plan = parse(row.texts(16, 4)[0])
        cause = uncovered(plan, 16, 4)
        assert (cause is None) == (policy_class(row.name) in TRAITS)
    left = {row.name for row in ROWS if policy_class(row.name) not in TRAITS}
    assert left == {"xshare_expert_parallel", "xshare_speculative", "depth", "hobbit", "bit_plan", "odp", "c2r"}


@pytest.mark.parametrize(
    ("plan", "experts", "top_k", "cause"),
    [
        (parse("xshare(8)"), 1024, 8, "up to 512"),
        (parse("xshare(8)"), 64, 32, "and 16"),
        (Plan(Lynx(8), (MinBatch(2), MinBatch(3))), 64, 8, "twice"),
        (parse("xshare_speculative(8, 4)"), 64, 8, "more than two launches"),
    ],
)
def test_plans_that_keep_the_general_path(plan: Plan, experts: int, top_k: int, cause: str) -> None:
    assert cause in (uncovered(plan, experts, top_k) or "")
    with pytest.raises(CarpoolError, match=cause):
        Fused(plan, RouteSpec(top_k=top_k), experts, {}, Scratch(1, 1, experts, "cpu"))


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Other(Lynx):
        """May decide otherwise."""

    assert uncovered(Plan(Other(8)), 64, 8) is not None
