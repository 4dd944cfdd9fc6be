"""Nobody outside a row's group changes its routing by a bit: captured logits, replayed alone and among co-batches."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from policies_under_test import ROWS, Row
from torch import Tensor

from carpool import Batch, Outcome, RouteSpec, parse, route
from carpool.hosts.engine.request_keys import OPT_OUT, PROMPT, SAMPLES
from carpool.hosts.engine.step_rows import Requests, Rows
from carpool.policies import policy_class

EXPERTS, TOP_K = 12, 3
REFERENCE = Path(__file__).parents[1] / "demo/src/carpool_demo"
POLICIES = ["xshare(budget=3)", "xshare(4, utility='squared') | floor(0.3)", "oea(1)", "des_vote(size=4)", "lynx(3)",
            "random(3)", "xshare(budget=3) | short_circuit | protect([2])"]  # fmt: skip
GUARDS = ("", " | floor(0.2)", " | decode_only | min_batch(2) | short_circuit")


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("seed", range(20))
def test_prompts_of_other_requests_are_not_heard(text: str, seed: int) -> None:
    """Rows 0 to 2 are one request that decodes; rows 3 and 4 are another's prompt in the same step."""
    generator = torch.Generator().manual_seed(seed)
    mine, theirs, others = (torch.randn(n, EXPERTS, generator=generator) * 2 for n in (3, 2, 2))
    group_N = torch.tensor([0, 0, 0, 1, 1])
    batch = Batch.of(5, group_N=group_N, num_groups=2, exempt_N=group_N == 1)
    spec = RouteSpec(top_k=TOP_K)
    first, second = (route(parse(text), spec, torch.cat((mine, rest)), batch) for rest in (theirs, others))
    assert torch.equal(first.routing.ids_NK[:3], second.routing.ids_NK[:3])
    assert torch.equal(first.routing.weights_NK[:3], second.routing.weights_NK[:3])
    assert torch.equal(first.coreset_GE[0], second.coreset_GE[0])


@functools.cache
def captured() -> Tensor:
    """Router logits of the reference model on its texts, `[layers * rows, E]`."""
    from carpool.artefacts.texts import load_texts
    from carpool.hosts.transformers import find_layers, load_model

    model, tokenizer = load_model(str(REFERENCE / "model"))
    texts = load_texts(sorted((REFERENCE / "texts").glob("*.jsonl")))
    by_domain = {text.domain: text.text for text in texts}
    ids_ST = torch.tensor([tokenizer(text[:2000])["input_ids"][:64] for text in by_domain.values()])
    seen: list[Tensor] = []
    hooks = [
        layer.router.register_forward_hook(
            lambda module, args, output, layer=layer: seen.append(layer.routed(output)[0])
        )
        for layer in find_layers(model)
    ]
    with torch.inference_mode():
        model(input_ids=ids_ST)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    return torch.cat([logits_NE.float() for logits_NE in seen]).clone()


@dataclass(frozen=True)
class Request:
    """A request of an engine's batch: its tenant, whose sample it is, its rows, and whether they are a prompt or opted
    out. `named`: the prompt's name that the caller gives."""

    logits_NE: Tensor
    tenant: Any = None
    prompt: bool = False
    off: bool = False
    sample_of: str | None = None
    named: str | None = None

    def extra_args(self) -> dict[str, Any] | None:
        given = {"carpool_tenant": self.tenant, SAMPLES: self.sample_of, PROMPT: self.named}
        given |= {OPT_OUT: "off"} if self.off else {}
        return {name: value for name, value in given.items() if value is not None} or None


def engine_batch(requests: list[Request], group: str, padding: int = 0) -> tuple[Tensor, Batch]:
    """Logits and rows as vLLM's host describes them."""
    lengths = np.array([len(request.logits_NE) for request in requests])
    prefill = np.array([request.prompt for request in requests])
    parameters = [SimpleNamespace(extra_args=request.extra_args()) for request in requests]
    rows = Rows(256, 64, group, torch.device("cpu"))
    rows.fill(Requests(lengths, prefill, parameters), int(lengths.sum()) + padding)
    logits_NE = torch.cat([*(request.logits_NE for request in requests), captured()[:padding]])
    return logits_NE, rows.batch(len(logits_NE))


def trouble(logits_NE: Tensor, rng: random.Random) -> Tensor:
    """What a co-batch may hold: now and then huge, tied, NaN or infinite logits."""
    kind = rng.randrange(8)
    made = logits_NE.clone()
    if kind == 0:
        made *= 1e4
    elif kind == 1:
        made.zero_()
    elif kind in (2, 3):
        made[0, rng.randrange(made.shape[1])] = (torch.nan, torch.inf)[kind - 2]
    return made


def strangers(rng: random.Random, count: int) -> list[Request]:
    made = []
    for _ in range(count):
        start, length = rng.randrange(len(captured()) - 8), rng.choice((1, 1, 1, 2, 4))
        logits_NE = trouble(captured()[start : start + length], rng)
        tenant = rng.choice((None, "other", "another", 5, 1.5, ""))
        made.append(
            Request(
                logits_NE, tenant, prompt=rng.random() < 0.2, off=rng.random() < 0.1,
                sample_of=rng.choice((None, "theirs", "others")), named=rng.choice((None, "mine", "name")),
            )
        )  # fmt: skip
    return made


def run(row: Row, text: str, logits_NE: Tensor, batch: Batch) -> Outcome:
    plan = parse(text)
    experts = logits_NE.shape[1]
    stats = plan.prepare(row.stats(experts, torch.Generator().manual_seed(0)))
    extras = {name: value for name, value in row.extras(len(logits_NE), experts).items() if name == "device_E"}
    hidden_NH = logits_NE.nan_to_num().clamp(-8, 8)[:, :4] if row.hidden else None
    return route(plan, RouteSpec(top_k=8), logits_NE, replace(batch, **extras), stats=stats, hidden_NH=hidden_NH)


def stacked(steps: list[tuple[Tensor, Batch]]) -> tuple[Tensor, Batch]:
    """Several steps of an engine in one call, their groups and requests apart."""
    logits, batches = zip(*steps, strict=True)
    rows = torch.tensor([len(batch.group_N) for batch in batches])

    def apart(name: str, counts: list[int]) -> Tensor:
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0).repeat_interleave(rows)
        return torch.cat([getattr(batch, name) for batch in batches]) + starts

    groups, requests = [batch.num_groups for batch in batches], [batch.num_requests for batch in batches]
    together = Batch(
        apart("group_N", groups), sum(groups), *(torch.cat([getattr(batch, name) for batch in batches])
        for name in ("real_N", "voter_N", "exempt_N")), apart("step_N", [1] * len(batches)), len(batches),
        request_N=apart("request_N", requests), num_requests=sum(requests),
    )  # fmt: skip
    return torch.cat(logits), together


def replay(row: Row, group: str, co_batches: int, at_once: int = 1) -> int:
    """Compare victims alone with the same victims among `at_once` co-batches each; returns the number of victims' rows
    that were changed by the policy, so that nothing passes inert."""
    rng, changed = random.Random(f"{row.name} {group}"), 0
    texts = row.texts(64, 8)
    for turn in range(co_batches // at_once):
        text = texts[turn % len(texts)] + GUARDS[turn // len(texts) % len(GUARDS)]
        start = rng.randrange(len(captured()) - 16)
        mine = [Request(captured()[start : start + 3], "mine")]
        if group == "tenant":
            mine += [Request(captured()[start + 4 + i : start + 6 + i], "mine", prompt=i == 2) for i in range(3)]
        if group == "prompt":  # three samples, with one row each but for drafts, and the prompt of a fourth
            lengths = (1, 1, rng.choice((1, 3)), 2)
            mine = [Request(captured()[start + 4 * i : start + 4 * i + length], rng.choice((None, "mine")),
                            prompt=i == 3, sample_of="mine", named="mine")
                    for i, length in enumerate(lengths)]  # fmt: skip
        if group == "batch":  # token-local policies: a single row
            mine = [Request(captured()[start : start + 1])]
        expected = run(row, text, *engine_batch(mine, group))
        steps, where, before = list[tuple[Tensor, Batch]](), list[Tensor](), 0
        for _ in range(at_once):
            order = [*mine, *strangers(rng, rng.randrange(1, 16))]
            rng.shuffle(order)
            steps.append(engine_batch(order, group, padding=rng.choice((0, 0, 3))))
            starts = np.cumsum([before, *(len(request.logits_NE) for request in order)])
            places = (index(order, request) for request in mine)
            where.append(torch.cat([torch.arange(starts[i], starts[i + 1]) for i in places]))
            before += len(steps[-1][0])
        found = run(row, text, *(steps[0] if at_once == 1 else stacked(steps)))
        for rows_N in where:
            assert torch.equal(found.routing.ids_NK[rows_N], expected.routing.ids_NK), text
            assert torch.equal(found.routing.weights_NK[rows_N], expected.routing.weights_NK), text
        changed += int(expected.changed_N.sum())
    return changed


def index(order: list[Request], request: Request) -> int:
    return next(i for i, other in enumerate(order) if other is request)


CASES = [(row, group) for row in ROWS for group in ("batch", "tenant", "prompt", "request")
         if group != "batch" or policy_class(row.name).kind == "token"]  # fmt: skip
CASES = [(row, group) for row, group in CASES if (row.name, group) != ("xshare_speculative", "request")]


@pytest.mark.parametrize(("row", "group"), CASES, ids=lambda value: str(value))
def test_co_batches_change_no_bit(row: Row, group: str) -> None:
    assert replay(row, group, 24) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("row", "group"), CASES, ids=lambda value: str(value))
def test_a_thousand_co_batches_change_no_bit(row: Row, group: str) -> None:
    """Every victim among 20 co-batches, which are the steps of one call; fewer where a policy pairs all groups with all
    requests of a call, which grows with their square."""
    assert replay(row, group, 1000, at_once=4 if row.name == "xshare_speculative" else 20) > 0


@pytest.mark.parametrize("row", [row for row in ROWS if policy_class(row.name).kind == "group"], ids=repr)
def test_the_replay_notices_a_batch_wide_run(row: Row) -> None:
    """The control: the same comparison fails where strangers do matter."""
    with pytest.raises(AssertionError):
        replay(row, "batch", 24)
    with pytest.raises(AssertionError):
        replay(row, "batch", 80, at_once=20)


def test_siblings_share_and_strangers_do_not() -> None:
    """Strangers who know the name of the prompt, or have the same tenant, do not join."""
    one = captured()[:1]
    whose = ["a", "b", "a", None, None, "b"]
    _, batch = engine_batch([Request(one, "same", sample_of=key, named="name") for key in whose], "prompt")
    assert batch.group_N.tolist() == [0, 1, 0, 3, 4, 1]
    _, by_request = engine_batch([Request(one, "same", sample_of=key, named="name") for key in whose], "request")
    assert by_request.group_N.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_tenants_requests_share_and_others_do_not() -> None:
    one = captured()[:1]
    tenants = ["a", "b", "a", None, None, 7, "7", 7, "", 1.5]
    _, batch = engine_batch([Request(one, tenant) for tenant in tenants], "tenant")
    assert batch.group_N.tolist() == [0, 1, 0, 3, 4, 5, 6, 5, 8, 9]
    assert batch.num_groups == 10
    mixed = [("a", None), (None, "x"), ("a", "x"), (None, "x"), (None, None)]  # who has no tenant has siblings
    _, batch = engine_batch([Request(one, tenant, sample_of=key) for tenant, key in mixed], "tenant")
    assert batch.group_N.tolist() == [0, 1, 0, 1, 4]
