"""Who answers which question: Symbolic-MoE as its paper and as its repository have it, and Carpool's plans.

Shapes: `N` questions, `E` experts, `K` recruits a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.models.profile import Nearest, Profile
from carpool.models.questions import Question
from carpool.plans.grammar import Plan, parse
from carpool.plans.pipeline import Outcome, route
from carpool.routing.batch import Batch
from carpool.routing.spec import RouteSpec

TEMPERATURE = 0.5  # the paper's tau
TRIM = 0.05  # share of a batch's draws under which the paper leaves an expert out
RULES = ("paper", "repository", "top1", "best", "random")


@dataclass(frozen=True, eq=False)
class Assignment:
    """Recruits of each question.

    Attributes:
        ids_NK: int64 in `[0, E)`; drawn with replacement an expert may come twice, and is asked once.
        weights_NK: what its answer counts, float64, summing to 1.
        empty_N: questions without a skill that the profile knows; they went by global competence.
        outcome: union and displaced mass, where a plan assigned; None otherwise.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    empty_N: Tensor
    outcome: Outcome | None = None

    @property
    def used(self) -> list[int]:
        """Distinct experts that anybody asks, ascending."""
        return sorted(set(self.ids_NK.flatten().tolist()))

    def asked(self, row: int) -> list[int]:
        """Distinct recruits of a question, ascending."""
        return sorted(set(self.ids_NK[row].tolist()))


def scores(profile: Profile, questions: Sequence[Question], nearest: Nearest | None = None) -> tuple[Tensor, Tensor]:
    """The paper's `w = gamma * S`, `[N, E]` float64, and which questions had no known skill, `[N]`.

    Those go by global competence alone, scaled as if they had every skill once.
    """
    strength_NE, empty_N = profile.strength(questions, nearest)
    total_E = torch.tensor(profile.balance_ES, dtype=torch.float64).sum(-1)
    strength_NE = torch.where(empty_N.unsqueeze(-1), total_E, strength_NE)
    return profile.gamma_E * strength_NE, empty_N


def recruit(
    rule: str | Plan,
    profile: Profile,
    questions: Sequence[Question],
    *,
    recruits: int = 1,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    nearest: Nearest | None = None,
) -> Assignment:
    """Recruit experts for a batch of questions.

    Args:
        rule: `paper`: `recruits` draws with replacement from the softmax of `w / temperature`; experts with under 5 %
            of the batch's draws are trimmed, and their draws are made again among the others (the paper does not say
            what becomes of them). `repository`: no softmax and no trimming (its function for that is never called);
            draws proportional to the positive part of `w`, squared: the temperature of 0.5 enters as a power.
            `top1`: the best of `w`. `best`: the one expert with the most right answers. `random`: any. Otherwise a
            plan of `carpool.parse`, such as `xshare(budget=2, warmup=0)`: the batch shares what it loads, and
            `w / temperature` are the router's logits.
        recruits: `K`; a plan takes distinct experts.
        seed: of the draws; they depend on the seed and the order of questions.

    Raises:
        CarpoolError: an unknown rule, a plan that does not fit the pool, more recruits than experts.
    """
    if not questions:
        raise CarpoolError("no questions to recruit experts for")
    if not 1 <= recruits <= len(profile.experts):
        raise CarpoolError(f"{recruits} recruits of {len(profile.experts)} experts; give 1 to {len(profile.experts)}")
    if not temperature > 0:
        raise CarpoolError(f"temperature={temperature}: give a number above 0")
    w_NE, empty_N = scores(profile, questions, nearest)
    generator = torch.Generator().manual_seed(seed)
    if rule == "paper":
        ids_NK = _trimmed((w_NE / temperature).softmax(-1), recruits, generator)
    elif rule == "repository":
        ids_NK = torch.multinomial(_as_in_the_repository(profile, w_NE), recruits, True, generator=generator)
    elif rule == "top1":
        ids_NK = w_NE.argmax(-1, keepdim=True)
    elif rule == "best":
        ids_NK = torch.full((len(questions), 1), profile.best)
    elif rule == "random":
        ids_NK = torch.randint(len(profile.experts), (len(questions), recruits), generator=generator)
    else:
        return _by_plan(_plan(rule), w_NE / temperature, recruits, empty_N)
    weights_NK = torch.full(ids_NK.shape, 1 / ids_NK.shape[1], dtype=torch.float64)
    return Assignment(ids_NK, weights_NK, empty_N)


def _plan(rule: str | Plan) -> Plan:
    if isinstance(rule, str) and rule.isidentifier():
        from carpool.policies import policies

        if rule not in policies():
            raise CarpoolError(
                f"unknown rule {rule!r}; use {', '.join(RULES)}, or a plan such as 'xshare(2, warmup=0)'"
            )
    return parse(rule)


def require_routable(plan: Plan, experts: int, recruits: int) -> None:
    """Raises CarpoolError for a plan that cannot choose among whole models: impossible numbers, or one that looks at
    what only layers have."""
    plan.check(experts, recruits)
    if plan.required_stats() or plan.policy.needs_hidden or plan.reads_depths:
        raise CarpoolError(f"{plan.policy.name} looks at what only layers of a model have; use one such as xshare")


def _by_plan(plan: Plan, logits_NE: Tensor, recruits: int, empty_N: Tensor) -> Assignment:
    spec = RouteSpec(top_k=recruits)
    require_routable(plan, logits_NE.shape[1], recruits)
    outcome = route(plan, spec, logits_NE.float(), Batch.of(len(logits_NE)))
    routing = outcome.routing
    return Assignment(routing.ids_NK.long(), routing.weights_NK.double(), empty_N, outcome)


def _trimmed(p_NE: Tensor, recruits: int, generator: torch.Generator) -> Tensor:
    """Draws with replacement; the draws of experts that got under 5 % of all are made again among the others."""
    ids_NK = torch.multinomial(p_NE, recruits, True, generator=generator)
    count_E = torch.bincount(ids_NK.flatten(), minlength=p_NE.shape[1])
    trimmed_E = (count_E < TRIM * ids_NK.numel()) & (count_E < count_E.max())
    left_NE = (p_NE * ~trimmed_E).clamp_min(torch.where(trimmed_E, 0.0, 1e-12).expand_as(p_NE))
    again_NK = torch.multinomial(left_NE, recruits, True, generator=generator)
    return torch.where(trimmed_E[ids_NK], again_NK, ids_NK)


def _as_in_the_repository(profile: Profile, w_NE: Tensor) -> Tensor:
    """Weights of its draws; the best expert alone where no strength is positive."""
    positive_NE = w_NE.clamp_min(0) ** (1 / TEMPERATURE)
    none_N1 = positive_NE.sum(-1, keepdim=True) <= 0
    best_NE = torch.nn.functional.one_hot(torch.tensor(profile.best), w_NE.shape[1]).double().expand_as(w_NE)
    return torch.where(none_N1, best_NE, positive_NE)
