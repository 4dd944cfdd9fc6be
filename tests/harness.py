"""What the tests of the core share: route a case under a plan, and turn it into the lists that a twin reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import twins
from hypothesis import settings
from hypothesis import strategies as st
from policies_under_test import Row
from strategies import Case, cases
from torch import Tensor

from carpool import Outcome, Plan, Routing, parse, route

many_examples = settings(max_examples=60)  # of properties that are cheap to try; the others have the profile's number

GUARDS = (
    "", " | floor(0.3)", " | min_batch(2) | short_circuit", " | decode_only | protect([1, 3]) | floor(0.1)",
    " | regret(0.05)", " | regret(0.1) | short_circuit | floor(0.6)",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trial:
    """A policy with its guards on a case."""

    row: Row
    case: Case
    plan: Plan

    def stats(self) -> dict[str, Tensor]:
        return self.row.stats(self.case.experts, self.case.generator())

    def run(self, case: Case | None = None, plan: Plan | None = None, native: Routing | None = None) -> Outcome:
        """Route the case, or a variation of it, under the plan, or a variation of it."""
        case, plan = case or self.case, plan or self.plan
        plan.check(case.experts, case.spec.top_k)
        stats = plan.prepare(self.stats())
        hidden_NH = hidden(case) if self.row.hidden else None
        return route(plan, case.spec, case.logits_NE, case.batch, native=native, stats=stats, hidden_NH=hidden_NH)

    def world(self) -> twins.World:
        """The case in plain lists."""
        case, spec, batch = self.case, self.case.spec, self.case.batch
        finite = case.logits_NE.isfinite().all(-1)
        clean_NE = case.logits_NE.nan_to_num()
        scores_NE, weights_NE = spec.scores(clean_NE)
        kept_NE = spec.in_kept_groups(scores_NE)
        never_N = torch.zeros_like(finite)
        extra = {key: as_list(value) for key, value in case.given.items()}
        if self.row.hidden:
            extra["hidden"] = hidden(case).tolist()
        return twins.World(
            scores=scores_NE.tolist(),
            weights=weights_NE.tolist(),
            native=spec.native(clean_NE).ids_NK.tolist(),
            top_k=spec.top_k,
            num_experts=case.experts,
            group=batch.group_N.tolist(),
            num_groups=batch.num_groups,
            step=batch.step_N.tolist(),
            real=(batch.real_N & finite).tolist(),
            voter=(batch.voter_N & finite).tolist(),
            exempt=(batch.exempt_N | ~finite).tolist(),
            prefill=case.given.get("prefill_N", never_N).tolist(),
            kept=None if kept_NE is None else kept_NE.tolist(),
            renormalize=spec.renormalize or spec.scoring == "softmax_after_topk",
            eps=spec.renormalize_eps,
            scaling=spec.scaling,
            per_expert=None if spec.per_expert_scale_E is None else spec.per_expert_scale_E.tolist(),
            stats={name: as_list(value) for name, value in self.stats().items()},
            extra=extra,
        )


def as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def hidden(case: Case) -> Tensor:
    """Hidden states `[N, 4]` that follow the logits, so that they are permuted and replaced with them."""
    return case.logits_NE.float().nan_to_num().clamp(-8, 8)[:, :4]


@st.composite
def trials(draw: st.DrawFn, row: Row, *, identity: bool = False, guards: tuple[str, ...] = GUARDS, **how: Any) -> Trial:
    case = draw(cases(**how))
    case = case.given_also(**row.extras(case.rows, case.experts))
    texts = (row.identity if identity else row.texts)(case.experts, case.spec.top_k)
    return Trial(row, case, parse(draw(st.sampled_from(texts)) + draw(st.sampled_from(guards))))


def a_host(case: Case) -> Routing:
    """The routing of a host whose weights nobody could recompute: it shows whose numbers a row got."""
    ids_NK = case.spec.native(case.logits_NE.nan_to_num()).ids_NK
    return Routing(ids_NK, torch.rand(ids_NK.shape, generator=case.generator()) + 7)


def assert_same(one: Routing, other: Routing, rows_N: Tensor | None = None) -> None:
    """Bit for bit, in these rows."""
    pick = slice(None) if rows_N is None else rows_N
    assert torch.equal(one.ids_NK[pick], other.ids_NK[pick])
    assert torch.equal(one.weights_NK[pick], other.weights_NK[pick])
    assert one.weights_NK.dtype == other.weights_NK.dtype
