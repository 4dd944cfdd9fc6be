"""A layer's routing in two launches, from the host's own scores, ids and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.kernels.counting import LANES
from carpool.kernels.deciding import decide
from carpool.kernels.traits import Traits, coreset_guards, traits_of, uncovered
from carpool.kernels.voting import vote
from carpool.plans.counters import FIELDS
from carpool.plans.grammar import Plan
from carpool.plans.guards import DecodeOnly, Floor, MinBatch, Protect
from carpool.plans.pipeline import scored
from carpool.policies import AllowList
from carpool.policies.controls import odd
from carpool.policies.parameters import Number
from carpool.routing.batch import Batch
from carpool.routing.spec import RouteSpec, Routing

CHUNK = 32  # experts that are ranked against all others at a time
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Scratch:
    """Buffers between the two launches, all zero before and after; one for all layers of a stream.

    Args:
        max_rows, max_groups, max_steps: of a call. num_experts: the most of a layer.
    """

    def __init__(
        self, max_rows: int, max_groups: int, num_experts: int, device: torch.device | str, max_steps: int = 1
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_rows, self.max_groups, self.max_steps = max_rows, max_groups, max_steps
        self.sums_GE = zeros(max_groups, num_experts, dtype=torch.int64)
        self.flags_GE = zeros(max_groups, num_experts)
        self.members_G4 = zeros(max_groups, 4)
        self.state_N = zeros(max_rows)
        self.scores_NE, self.weights_NE = zeros(2, max_rows, num_experts, dtype=torch.float32)
        self.sharing, self.ticket = zeros(1), zeros(1)
        self.steps_SE = zeros(max_steps, num_experts)
        self.counts = zeros(LANES.value, dtype=torch.int64)

    @property
    def memory(self) -> int:
        """Bytes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def fits(self, num_rows: int, batch: Batch) -> bool:
        """Whether a batch is within the sizes."""
        groups, steps = batch.num_groups <= self.max_groups, batch.num_steps <= self.max_steps
        return num_rows <= self.max_rows and groups and steps


@dataclass(frozen=True)
class Tables:
    """Tensors of a plan on the device; None where it has none.

    Attributes:
        warm, size, number, tau: 0-d, what may change at run time.
        allow_E, protected_E: bool.
    """

    warm: Tensor | None
    size: Tensor | None
    number: Tensor | None
    tau: Tensor | None
    allow_E: Tensor | None
    protected_E: Tensor | None


class Fused:
    """The two launches of one layer's plan. Everything is prepared here: a call copies nothing to the device.

    Args:
        plan: its numbers may be 0-d device tensors.
        spec: the model's rule. stats: of the layer, as `Policy.prepare` returned them.

    Raises:
        CarpoolError: a plan that the kernels do not take (`traits.uncovered`).
    """

    def __init__(self, plan: Plan, spec: RouteSpec, num_experts: int, stats: Mapping[str, Tensor],
                 scratch: Scratch) -> None:  # fmt: skip
        cause = uncovered(plan, num_experts, spec.top_k)
        if cause is not None:
            raise CarpoolError(f"{plan}: {cause}")
        self.plan, self.spec, self.num_experts, self.stats, self.scratch = plan, spec, num_experts, stats, scratch
        self.traits = traits_of(plan.policy, num_experts, spec.top_k)
        self.device = scratch.counts.device
        self.tables = self._tables(self.traits)
        self.shape = self._shape()
        self.rule = self._rule()
        self.decode_only = any(isinstance(guard, DecodeOnly) for guard in plan.guards)

    def __call__(
        self, logits_NE: Tensor, native: Routing, batch: Batch, totals_F: Tensor, *,
        scores: tuple[Tensor, Tensor] | None = None, energy_NE: Tensor | None = None, follow: bool = False,
    ) -> Routing:  # fmt: skip
        """The routing of one call, as `plans.pipeline.decide` gives it. Tensors `[N, E]` and `[N, K]` are contiguous.

        Args:
            totals_F: float64, the layer's counters, which grow by what `plans.counters.measured` says.
            scores: what the router ranks and mixes by (`plans.pipeline.scored`); None: the first launch computes them.
            energy_NE: for `base`, what its predictor gives.
            follow: rows that are not real take the first row's experts, and nothing is counted where no row votes.
        """
        count = len(logits_NE)
        ids_NK, weights_NK = torch.empty_like(native.ids_NK), torch.empty_like(native.weights_NK)
        left: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.traits.assign == "leave":
            dtype = self.spec.weight_dtype or torch.float32
            left = torch.empty_like(native.ids_NK, dtype=torch.int32), torch.empty_like(weights_NK, dtype=dtype)
        if count == 0:
            if not follow:  # no program would run to count the call
                totals_F[FIELDS.index("calls")] += 1
                totals_F[FIELDS.index("steps")] += batch.num_steps
            return Routing(native.ids_NK, native.weights_NK, *left)
        tables, stats, scratch, spec = self.tables, self.stats, self.scratch, self.spec
        if scores is None and self._needs_scores(logits_NE):
            scores = scored(spec, logits_NE)
        scoring = spec.scoring if scores is None else "given"
        narrow = logits_NE.dtype if spec.score_in_logits_dtype else torch.float32
        dtype = narrow if scores is None else scores[0].dtype
        scores_NE, weights_NE = scores or (scratch.scores_NE, scratch.weights_NE)
        buffers = (scratch.sums_GE, scratch.flags_GE, scratch.members_G4, scratch.state_N, scratch.sharing)
        how = self.shape | {"SCORES": DTYPES[dtype], "FOLLOW": follow}
        options: dict[str, Any] = {"num_warps": self.warps, "enable_fp_fusion": False}
        vote[(count,)](
            logits_NE, scores_NE, weights_NE, native.ids_NK, energy_NE,
            batch.group_N, batch.step_N, batch.real_N, batch.voter_N, batch.exempt_N,
            batch.prefill_N if self.decode_only else None, spec.bias_E, spec.per_expert_scale_E, stats.get("cost"),
            tables.warm, *buffers, **how, SCORING=scoring, UTILITY=self.traits.utility,
            WARMUP=self.traits.warm is not None, **options,
        )  # fmt: skip
        decide[(count,)](
            scores_NE, weights_NE, native.ids_NK, native.weights_NK,
            batch.group_N, batch.step_N, batch.real_N, spec.per_expert_scale_E,
            tables.size, tables.number, tables.tau, stats.get("sensitivity"), tables.allow_E, tables.protected_E,
            stats.get("similarity"), stats.get("keys"), stats.get("expected_loss"), stats.get("left"), *buffers,
            scratch.steps_SE, batch.num_steps, scratch.counts, scratch.ticket, totals_F,
            ids_NK, weights_NK, *left, **how, **self.rule, **options,
        )  # fmt: skip
        return Routing(ids_NK, weights_NK, *left)

    def _needs_scores(self, logits_NE: Tensor) -> bool:
        """Whether the model scores as the kernels do not: a bias beside 16 bits."""
        return self.spec.score_in_logits_dtype and self.spec.bias_E is not None and logits_NE.dtype != torch.float32

    @property
    def warps(self) -> int:
        return 4 if self.num_experts <= 128 else 8

    def _tables(self, traits: Traits) -> Tables:
        policy = self.plan.policy
        tau = next((guard.tau for guard in self.plan.guards if isinstance(guard, Floor)), None)
        protected = next((guard.experts for guard in self.plan.guards if isinstance(guard, Protect)), None)
        allow_E = None
        if isinstance(policy, AllowList):
            listed = policy.experts
            allow_E = self.stats["allow"] if listed is None else self._mask(listed)
        return Tables(
            self._number(traits.warm), self._number(traits.size), self._number(traits.number), self._number(tau),
            allow_E, None if protected is None else self._mask(protected),
        )  # fmt: skip

    def _number(self, value: Number | None) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return value
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64, device=self.device)

    def _mask(self, experts: tuple[int, ...]) -> Tensor:
        return torch.tensor([expert in experts for expert in range(self.num_experts)], device=self.device)

    def _shape(self) -> dict[str, Any]:
        spec = self.spec
        limited = spec.kept_groups < spec.num_groups
        groups, kept = (spec.num_groups, spec.kept_groups) if limited else (1, 1)
        return {
            "EXPERTS": self.num_experts,
            "TOP_K": spec.top_k,
            "BLOCK_E": triton.next_power_of_2(self.num_experts),
            "BLOCK_K": triton.next_power_of_2(spec.top_k),
            "GROUPS": groups,
            "KEPT": kept,
            "TOP2": spec.group_score == "top2",
            "BLOCK_G": triton.next_power_of_2(groups),
            "BLOCK_S": triton.next_power_of_2(self.num_experts // groups),
        }

    def _rule(self) -> dict[str, Any]:
        spec, traits = self.spec, self.traits
        guards = coreset_guards(self.plan, self.num_experts, spec.top_k)
        least = next((guard.voters for guard in self.plan.guards if isinstance(guard, MinBatch)), 0)
        first, second, third = [*guards, "", "", ""][:3]
        return {
            "RENORMALIZE": spec.renormalize or spec.scoring == "softmax_after_topk",
            "EPS": spec.renormalize_eps,
            "SCALING": spec.scaling,
            "DTYPE": DTYPES[spec.weight_dtype or torch.float32],
            "RULE": traits.rule,
            "ASSIGN": traits.assign,
            "UTILITY": traits.utility,
            "WARMUP": traits.warm is not None,
            "MIX": odd(2 * traits.seed),
            "STIR": odd(2 * traits.seed + 1),
            "CHUNK": min(CHUNK, self.shape["BLOCK_E"]),
            "FIRST": first,
            "SECOND": second,
            "THIRD": third,
            "LEAST": least if "min_batch" in guards else 0,
        }
