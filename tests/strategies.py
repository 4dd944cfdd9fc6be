"""Batches for hypothesis: few drawn numbers choose the shape and the kind of trouble, a seeded generator fills in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from carpool import Batch, RouteSpec

EXPERTS = (4, 6, 16, 60, 64, 128, 512)
ROWS = (0, 1, 2, 3, 5, 8, 17)
PATTERNS = ("normal", "quantised", "equal", "huge", "denormal", "copies", "peaked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Case:
    """A layer's batch: logits, the model's rule, and `Batch.of` arguments."""

    spec: RouteSpec
    logits_NE: Tensor
    given: dict[str, Any]
    seed: int

    @property
    def rows(self) -> int:
        return self.logits_NE.shape[0]

    @property
    def experts(self) -> int:
        return self.logits_NE.shape[1]

    @property
    def batch(self) -> Batch:
        return Batch.of(self.rows, **self.given)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def rows_at(self, order_N: Tensor) -> Case:
        """The same case with its rows picked or permuted."""
        given = {k: v[order_N] if k.endswith("_N") else v for k, v in self.given.items()}
        return Case(self.spec, self.logits_NE[order_N], given, self.seed)

    def with_logits(self, logits_NE: Tensor) -> Case:
        return Case(self.spec, logits_NE, self.given, self.seed)

    def given_also(self, **given: Any) -> Case:
        return Case(self.spec, self.logits_NE, {**self.given, **given}, self.seed)


def logits_of(pattern: str, rows: int, experts: int, generator: torch.Generator) -> Tensor:
    logits_NE = torch.randn(rows, experts, generator=generator)
    if pattern == "quantised":
        return (logits_NE * 2).round() / 2
    if pattern == "equal":
        return torch.zeros_like(logits_NE)
    if pattern == "huge":
        return logits_NE * 1e4
    if pattern == "denormal":
        return logits_NE * 1e-40
    if pattern == "copies" and rows:
        return logits_NE[:1].expand(rows, experts).clone()
    if pattern == "peaked":
        return logits_NE * 8
    return logits_NE


@st.composite
def specs(draw: st.DrawFn, experts: int, *, groups: bool = True) -> RouteSpec:
    """Any rule that `RouteSpec` describes, for a layer with this many experts."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scoring = draw(st.sampled_from(["softmax", "softmax", "softmax_after_topk", "sigmoid", "sqrtsoftplus"]))
    divisible = groups and experts % 4 == 0 and experts >= 16 and scoring != "softmax_after_topk"
    num_groups = draw(st.sampled_from([1, 4])) if divisible else 1
    kept_groups = draw(st.sampled_from([1, 2, 3])) if num_groups > 1 else 1
    room = experts * kept_groups // num_groups
    bias = draw(st.booleans()) and scoring == "sigmoid"
    scale = draw(st.integers(0, 4)) == 0
    return RouteSpec(
        top_k=draw(st.sampled_from([k for k in (1, 2, 4, 8) if k <= room])),
        scoring=scoring,
        renormalize=draw(st.booleans()),
        renormalize_eps=draw(st.sampled_from([0.0, 1e-20])),
        scaling=draw(st.sampled_from([1.0, 2.5])),
        bias_E=torch.randn(experts, generator=generator) / 10 if bias else None,
        num_groups=num_groups,
        kept_groups=kept_groups,
        group_score=draw(st.sampled_from(["max", "top2"])),
        per_expert_scale_E=torch.rand(experts, generator=generator) + 0.5 if scale else None,
        score_in_logits_dtype=draw(st.booleans()),
        weight_dtype=draw(st.sampled_from([None, torch.bfloat16])),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    patterns: tuple[str, ...] = PATTERNS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    rows: tuple[int, ...] = ROWS,
    troubled: bool = True,
    groups: bool = True,
) -> Case:
    """A case; `troubled` adds padding, finished sequences, exempt, prompt and non-finite rows; `groups` the model's
    expert groups."""
    experts = draw(st.sampled_from(EXPERTS))
    count = draw(st.sampled_from([n for n in rows if n <= 8 or experts <= 128]))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    spec = draw(specs(experts, groups=groups))
    logits_NE = logits_of(draw(st.sampled_from(patterns)), count, experts, generator).to(draw(st.sampled_from(dtypes)))
    num_groups = draw(st.sampled_from([1, 1, 2, 4]))
    num_steps = draw(st.sampled_from([1, num_groups]))
    group_N = torch.randint(0, num_groups, (count,), generator=generator)
    given: dict[str, Any] = {
        "group_N": group_N,
        "num_groups": num_groups,
        "step_N": group_N if num_steps > 1 else torch.zeros_like(group_N),
        "num_steps": num_steps,
    }
    if troubled and draw(st.booleans()):
        kind_N = torch.randint(0, 9, (count,), generator=generator)
        given["real_N"] = kind_N != 0
        given["voter_N"] = kind_N != 1
        given["exempt_N"] = kind_N == 2
        given["prefill_N"] = kind_N == 3
        for kind, value in ((4, torch.nan), (5, torch.inf), (6, -torch.inf)):
            bad_N = (kind_N == kind) & (torch.rand(count, generator=generator) < 0.5)
            logits_NE[bad_N, kind % experts] = value
    return Case(spec, logits_NE, given, seed)
