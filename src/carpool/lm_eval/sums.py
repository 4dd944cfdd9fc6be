"""What a policy did in the decoding steps of a task, for its results; a policy that changed nothing is no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import carpool
from carpool.errors import CarpoolError
from carpool.plans.pipeline import Outcome
from carpool.plans.policy_file import AnyPlan, PolicyFile
from carpool.routing.batch import Batch, Grouping

FIELDS = ("rows", "changed_rows", "steps", "experts_read", "experts_natively", "displaced_mass", "expected_loss")


class Sums:
    """Sums over layers and decoding steps, on the device; `share` calls it after every layer's routing."""

    def __init__(self) -> None:
        self._total_F: Tensor | None = None
        self._changed = 0.0  # when it was asked for last

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        decoded_N = batch.real_N & ~batch.exempt_N
        decoded_S1 = batch.step_any(decoded_N.unsqueeze(-1))
        values = (
            decoded_N.sum(), (outcome.changed_N & decoded_N).sum(), decoded_S1.sum(),
            (outcome.union_SE & decoded_S1).sum(), (outcome.natural_SE & decoded_S1).sum(),
            (outcome.displaced_N * decoded_N).sum(), (outcome.expected_loss_N * decoded_N).sum(),
        )  # fmt: skip
        self._add(torch.stack([value.double() for value in values]))

    def add(self, **counted: float) -> None:
        """Add sums by field, all of `FIELDS`."""
        self._add(torch.tensor([float(counted[name]) for name in FIELDS], dtype=torch.float64))

    def _add(self, values_F: Tensor) -> None:
        self._total_F = values_F if self._total_F is None else self._total_F + values_F.to(self._total_F.device)

    def totals(self) -> dict[str, float]:
        """By field; `rows` and `steps` count every layer."""
        values = [0.0] * len(FIELDS) if self._total_F is None else self._total_F.tolist()
        return dict(zip(FIELDS, values, strict=True))

    def require_changed(self, plan: AnyPlan, task: str, allow_unchanged: bool) -> None:
        """Raises CarpoolError if nothing was routed otherwise than natively since the last call."""
        before, self._changed = self._changed, self.totals()["changed_rows"]
        if self._changed == before and not allow_unchanged:
            raise CarpoolError(
                f"{plan} changed no row of the task {task}: it is an identity setting or did nothing, and the scores "
                "would be the stock model's; pass allow_unchanged=True if that is what you want"
            )


def by_task(
    requests: list[Any], ask: Callable[[list[Any]], list[Any]], sums: Sums, plan: AnyPlan, allow_unchanged: bool
) -> list[Any]:
    """Answers in the order of the requests; each task's requests are asked apart, so that what a task scores does not
    depend on the tasks beside it. Raises CarpoolError for a task in which no row was changed."""
    answers: dict[int, Any] = {}
    for task in dict.fromkeys(request.task_name for request in requests):
        places = [place for place, request in enumerate(requests) if request.task_name == task]
        answers.update(zip(places, ask([requests[place] for place in places]), strict=True))
        sums.require_changed(plan, str(task), allow_unchanged)
    return [answers[place] for place in range(len(requests))]


def depends(plan: AnyPlan, group: str, together: int) -> str:
    """What scores depend on beside model, policy and request, in one sentence for results and their readers."""
    if plan.policy.kind == "token" or group.startswith(("request", "block")):
        return "scores do not depend on the requests that decode together"
    return (
        f"scores depend on the requests that decode together ({together}, grouped by {group}): compare them with "
        "results of the same number and group alone"
    )


def facts(plan: AnyPlan, sums: Sums, group: str, together: int, **given: Any) -> dict[str, Any]:
    """For results: the policy, who shares, counts over layers, and means a layer and step (experts) or a row (displaced
    mass, expected loss)."""
    total = sums.totals()
    steps, rows = max(total["steps"], 1), max(total["rows"], 1)
    layers = {"layers": {str(index): own for index, own in plan.layers.items()}} if isinstance(plan, PolicyFile) else {}
    return {
        "version": carpool.__version__,
        "policy": str(plan),
        **layers,
        "group": group,
        "requests_together": together,
        "depends": depends(plan, group, together),
        **given,
        "rows": int(total["rows"]),
        "changed_rows": int(total["changed_rows"]),
        "experts_read": total["experts_read"] / steps,
        "experts_natively": total["experts_natively"] / steps,
        "displaced_mass": total["displaced_mass"] / rows,
        "expected_loss": total["expected_loss"] / rows,
    }


def told(found: dict[str, Any]) -> str:
    """What a policy did, in one sentence, from `facts`."""
    if not found["rows"]:
        return f"{found['policy']}: nothing was decoded under it"
    read = found["experts_read"] / found["experts_natively"] if found["experts_natively"] else 1.0
    changed = found["changed_rows"] / found["rows"]
    return (
        f"{found['policy']}, grouped by {found['group']}, {found['requests_together']} requests together: "
        f"{found['experts_read']:.1f} of {found['experts_natively']:.1f} experts read a layer and step ({read:.0%}), "
        f"{changed:.0%} of {found['rows']:,} decoded rows (layers added up) routed otherwise than natively, "
        f"{found['displaced_mass']:.1%} of a row's native weight displaced"
    )


def require_company(plan: AnyPlan, grouping: Grouping, batch_size: int) -> None:
    """Raises CarpoolError for the harness's default of one request at a time, where nobody shares with anybody."""
    if batch_size == 1 and plan.policy.kind == "group" and grouping.kind in ("batch", "position"):
        raise CarpoolError(
            f"batch_size=1: under {plan} requests that decode together share experts, so one alone measures something "
            "else; give the number that decode together where you serve"
        )


def require_no_cache(cache_hook: Any) -> None:
    """Raises CarpoolError for the harness's cache of answers, which does not know the policy they were given under."""
    if getattr(cache_hook, "dbdict", None) is not None:
        raise CarpoolError("use_cache keeps answers without the policy they were given under: leave it out")
