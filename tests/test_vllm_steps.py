"""Steps in which a policy had nothing to do, told apart: no row may share, or every row is alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from carpool import parse
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.hosts.engine.steps import Steps


def params(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra)


def counted(group: str, plan: str, *batches: list[tuple[bool, Any]]) -> dict[str, int]:
    """Of batches of one row a request: whether it is a prompt's, and its parameters."""
    rows = Rows(16, 8, group, torch.device("cpu"), "batch")
    layers: list[Any] = [SimpleNamespace(plan=parse(plan).for_serving()) for _ in range(2)]
    steps = Steps(rows, layers)
    for batch in batches:
        prefill = np.array([prompt for prompt, _ in batch], bool)
        rows.fill(Requests(np.ones(len(batch), np.int64), prefill, [given for _, given in batch]), 8)
        steps.stepped()
        rows.clear()
    steps.stepped()  # warm-up and padding: no request runs
    return steps.counts


SHARING, PROMPT, OUT = (False, params()), (True, params()), (False, params(carpool="off"))
A, B = (False, params(carpool_tenant="a")), (False, params(carpool_tenant="b"))


@pytest.mark.parametrize(
    ("group", "plan", "batch", "exempt", "alone"),
    [
        ("batch", "xshare(budget=4)", [SHARING, SHARING], 0, 0),
        ("batch", "xshare(budget=4)", [SHARING], 0, 1),
        ("batch", "xshare(budget=4)", [SHARING, PROMPT, OUT], 0, 1),
        ("batch", "xshare(budget=4) | min_batch(3)", [SHARING, SHARING], 0, 1),
        ("batch", "xshare(budget=4)", [PROMPT, OUT], 1, 0),
        ("batch", "topk(k=2)", [SHARING], 0, 0),  # token-local: one row is enough
        ("tenant", "xshare(budget=4)", [A, B], 0, 1),
        ("tenant", "xshare(budget=4)", [A, B, A], 0, 0),
        ("tenant", "xshare(budget=4)", [A, (True, params(carpool_tenant="a"))], 0, 1),
        ("request", "xshare(budget=4)", [SHARING, SHARING], 0, 1),
    ],
)
def test_a_step_is_exempt_alone_or_neither(group: str, plan: str, batch: Any, exempt: int, alone: int) -> None:
    assert counted(group, plan, batch) == {"passes": 1, "passes_exempt": exempt, "passes_alone": alone}


def test_steps_add_up_and_begin_anew() -> None:
    assert counted("batch", "xshare(budget=4)", [SHARING], [SHARING, SHARING], [OUT], [SHARING]) == {
        "passes": 4, "passes_exempt": 1, "passes_alone": 2,
    }  # fmt: skip
    rows = Rows(4, 4, "batch", torch.device("cpu"))
    steps = Steps(rows, [])
    rows.fill(Requests(np.ones(1, np.int64), np.zeros(1, bool), [None]), 1)
    steps.stepped()
    steps.begin()
    assert set(steps.counts.values()) == {0}
