"""What CUDA graphs and compilers ask of a policy: one graph, static shapes, no look at a value, few operations."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from harness import Trial, hidden
from policies_under_test import ROWS, Row
from strategies import Case
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from carpool import RouteSpec, Routing, parse, route
from carpool.plans.pipeline import decide, scored

every_policy = pytest.mark.parametrize("row", ROWS, ids=repr)
E, K, N = 16, 4, 6

# `sigmoid` with expert groups and a bias is the longest way through `RouteSpec`
PLAIN = RouteSpec(top_k=K)
GROUPED = RouteSpec(top_k=K, scoring="sigmoid", bias_E=torch.arange(E) / 100, num_groups=4, kept_groups=2)
SERVING = " | protect([3]) | decode_only | min_batch(2) | short_circuit | regret(0.2) | floor(0.3)"


def a_case(row: Row, spec: RouteSpec = PLAIN) -> Case:
    generator = torch.Generator().manual_seed(5)
    group_N = torch.arange(N) % 2
    given: dict[str, Any] = {
        "group_N": group_N,
        "num_groups": 2,
        "exempt_N": torch.arange(N) == 5,
        "prefill_N": torch.arange(N) == 4,
        **row.extras(N, E),
    }
    return Case(spec, torch.randn(N, E, generator=generator), given, 5)


def arguments(trial: Trial) -> dict[str, Any]:
    case = trial.case
    return {
        "logits_NE": case.logits_NE,
        "batch": case.batch,
        "native": case.spec.native(case.logits_NE),
        "stats": trial.plan.prepare(trial.stats()),
        "hidden_NH": hidden(case) if trial.row.hidden else None,
    }


def compiled_equals_eager(row: Row, text: str, backend: str) -> None:
    trial = Trial(row, a_case(row), parse(text))
    given = arguments(trial)
    plan, spec = trial.plan, trial.case.spec
    scores = scored(spec, given["logits_NE"])  # outside of the graph as in engines: compilers round a softmax otherwise
    inputs = (given["logits_NE"], *scores, given["native"].ids_NK, given["native"].weights_NK)
    others = {name: value for name, value in given.items() if name not in ("logits_NE", "native")}

    def routed(
        logits_NE: Tensor, scores_NE: Tensor, weights_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor
    ) -> tuple[Tensor, ...]:
        native = Routing(ids_NK, weights_NK)
        outcome = decide(plan, spec, logits_NE, scores_NE, weights_NE, native=native, **others)
        chosen = (tensor for tensor in vars(outcome.routing).values() if tensor is not None)
        return (*chosen, outcome.coreset_GE, outcome.union_SE, outcome.displaced_N)

    torch._dynamo.reset()
    graph = torch.compile(routed, fullgraph=True, backend=backend, dynamic=False)
    for slow, fast in zip(routed(*inputs), graph(*inputs), strict=True):
        if slow.is_floating_point():
            torch.testing.assert_close(slow, fast)
        else:
            assert torch.equal(slow, fast)


@every_policy
def test_compiles_to_one_graph(row: Row) -> None:
    compiled_equals_eager(row, row.texts(E, K)[0] + SERVING, "eager")


@pytest.mark.parametrize("spec", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_scores_compile_to_one_graph(spec: RouteSpec) -> None:
    logits_NE = torch.randn(N, E, generator=torch.Generator().manual_seed(5))
    torch._dynamo.reset()
    graph = torch.compile(partial(scored, spec), fullgraph=True, backend="eager", dynamic=False)
    assert all(map(torch.equal, scored(spec, logits_NE), graph(logits_NE)))


@pytest.mark.slow
@every_policy
def test_compiles_with_inductor(row: Row) -> None:
    for text in row.texts(E, K):
        compiled_equals_eager(row, text + SERVING, "inductor")


def as_fake(mode: FakeTensorMode, thing: Any) -> Any:
    """The same arguments without their values."""
    if isinstance(thing, Tensor):
        return mode.from_tensor(thing)
    if isinstance(thing, dict):
        return {key: as_fake(mode, value) for key, value in thing.items()}
    if hasattr(thing, "__dataclass_fields__"):
        changes = {k: as_fake(mode, v) for k, v in vars(thing).items() if isinstance(v, Tensor)}
        return replace(thing, **{k: v for k, v in changes.items() if k in thing.__dataclass_fields__})
    return thing


@every_policy
@pytest.mark.parametrize("spec", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_no_shape_and_no_branch_depends_on_a_value(row: Row, spec: RouteSpec) -> None:
    """Tensors without values pass: nothing waits for the device, knobs on the device included."""
    for text in row.texts(E, K):
        trial = Trial(row, a_case(row, spec), parse(text + SERVING))
        knobs = {
            k: torch.tensor(getattr(trial.plan.policy, k))
            for k in row.knobs
            if type(getattr(trial.plan.policy, k)) is int
        }
        mode = FakeTensorMode()
        policy = as_fake(mode, replace(trial.plan.policy, **knobs))
        given = as_fake(mode, arguments(trial))
        with mode:
            outcome = route(replace(trial.plan, policy=policy), as_fake(mode, spec), **given)
            shapes = outcome.routing.ids_NK.shape, outcome.union_SE.shape, outcome.displaced_N.shape
        assert shapes == ((N, K), (1, E), (N,))


def test_a_look_at_a_value_would_be_seen() -> None:
    mode = FakeTensorMode()
    with pytest.raises(DataDependentOutputException), mode:
        mode.from_tensor(torch.ones(3)).sum().item()


SHARED = {
    "backfill", "drop", "leave", "merge_duplicates", "votes", "utility", "utility_rank", "front_of", "skip", "mix",
    "by_request",
}  # fmt: skip


class CountOperations(TorchDispatchMode):
    """Counts ATen operations that do work (views do not), those inside shared steps under the step's name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count[self.step()] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def step() -> str:
        frame, inner = sys._getframe(), "policy"
        while frame is not None and frame.f_back is not None:
            if frame.f_code.co_name in SHARED and "carpool" in frame.f_code.co_filename:
                inner = frame.f_code.co_name
                if inner == "mix":
                    return inner
            frame = frame.f_back
        return inner


@every_policy
def test_few_operations(row: Row) -> None:
    """At most 15 of a policy's own; the shared steps have bounds of their own, for each of its stages."""
    for text in row.texts(E, K):
        trial = Trial(row, a_case(row), parse(text))
        outcome = trial.run()
        inputs, policy = outcome.inputs, trial.plan.policy
        known = (
            inputs.rank_NE,
            inputs.native_NE,
            inputs.native_share_NE,
            inputs.free_GE,
            inputs.voters_G1,
            inputs.experts_E,
            inputs.voter_N1,
        )
        assert all(isinstance(value, Tensor) for value in known)  # cached: not counted below
        with CountOperations() as mode:
            coreset_GE = policy.coreset(inputs)
            allowed_NE = policy.allowed(inputs, coreset_GE)
            policy.assign(inputs, allowed_NE, coreset_GE)
        print(f"{text}: {dict(mode.count)}")
        assert mode.count.total() >= 1
        assert mode.count["policy"] <= 15, f"{text}: {mode.count}"
        for step in SHARED:
            assert mode.count[step] <= 15 * row.stages, f"{text}: {mode.count}"
