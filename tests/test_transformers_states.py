"""Models in every state that training and loading put them into: what is shared is the same there as in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rows_of_callers import PLAN, ids, offloaded
from tiny_models import tiny_model
from torch import Tensor

import carpool
from carpool import CarpoolError
from carpool.hosts.transformers import attach, find_layers, identity

FAMILIES = ("qwen3_moe", "deepseek_v3", "gemma4_text", "minimax_m2")  # with a bias or a scale of each kind, or none


@torch.no_grad()
def logits(model: Any, plan: str = PLAN, **options: Any) -> tuple[Tensor, int]:
    with carpool.share(model, plan, exempt_prefill=False, **options) as run:
        made = model(input_ids=ids(4, 6)).logits
    return made, run.changed_rows()


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights_are_read_where_they_lie(family: str, how: str) -> None:
    """Routing, the check of the routers' rules and the model's name in files."""
    whole = tiny_model(family)
    kept = offloaded(how)(tiny_model(family))
    assert find_layers(kept)[0].router.weight.is_meta if family != "gemma4_text" else True
    for one, other in zip(logits(kept), logits(whole), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert identity(find_layers(kept)).fingerprint == identity(find_layers(whole)).fingerprint


def test_an_offloaded_router_that_breaks_its_rule_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    router = model.model.layers[1].mlp.gate
    stock = router.forward

    def next_experts(hidden: Tensor) -> tuple[Tensor, ...]:
        router_logits, weights, experts = stock(hidden)
        return router_logits, weights, (experts + 1) % 8

    router.forward = next_experts
    with pytest.raises(CarpoolError, match=r"layers\.1\.mlp: Qwen3MoeTopKRouter picks other experts"):
        attach(offloaded("cpu")(model))


def gradients(reentrant: bool | None, *, plan: str = PLAN, outside: bool = False, late: bool = False) -> Any:
    """Of every parameter, and the calls that were counted; None is without checkpoints."""
    model = tiny_model("qwen3_moe").train()

    def enable() -> None:
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    if not late:
        enable()
    with carpool.share(model, plan, exempt_prefill=False) as run:
        if late:
            enable()
        loss = model(ids(4, 6), labels=ids(4, 6)).loss
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    assert [row.calls for row in run.report()] == [1, 1]
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(grad, other[name]) for name, grad in one.items())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_same_routing(reentrant: bool, outside: bool, late: bool) -> None:
    """Whether the backward pass runs in the block or after it, and checkpointing was enabled before or in it."""
    made = gradients(reentrant, outside=outside, late=late)
    assert same(made, gradients(None))
    assert not same(made, gradients(None, plan="xshare(budget=8)"))


def test_a_stock_forward_stays_stock_when_it_is_recomputed_in_a_block() -> None:
    model = tiny_model("qwen3_moe").train()
    model.gradient_checkpointing_enable()
    attach(model)
    loss = model(ids(4, 6), labels=ids(4, 6)).loss
    with carpool.share(model, PLAN, exempt_prefill=False):
        loss.backward()
        stock = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model(ids(4, 6))
    assert same(stock, gradients(None, plan="xshare(budget=8)"))


def test_a_compiled_model_generates_with_a_static_cache() -> None:
    """The entrance's hooks are traced: prompts, chunks and decoding steps from tensors alone."""
    from transformers import StaticCache

    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    seen: dict[Any, list[str]] = {}

    def steps(called: Any) -> list[Tensor]:
        cache, made = StaticCache(model.config, max_cache_len=16), []
        mask = torch.zeros(3, 16, dtype=torch.int64)
        with torch.no_grad(), carpool.share(model, PLAN) as run:
            for start, end in ((0, 5), (5, 6), (6, 7)):
                mask[:, start:end] = 1
                output = called(input_ids=ids(3, 7)[:, start:end], attention_mask=mask, past_key_values=cache)
                made.append(output.logits)
        seen[called] = [(row.rows, row.rows_exempt) for row in run.report()]
        return made

    attach(model)
    eager = steps(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for one, other in zip(steps(compiled), eager, strict=True):
        torch.testing.assert_close(one, other)
    assert seen[compiled] == seen[model] == [(21, 15)]
