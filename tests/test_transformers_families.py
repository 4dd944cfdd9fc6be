"""Every family of the transformers host: found, checked, re-routed inside the coreset, untouched otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tokens

import carpool
from carpool import CarpoolError
from carpool.hosts.transformers import attach, find_layers
from carpool.hosts.transformers.conformance import check, check_on_random

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return tiny_model(family)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def test_layers_are_found_with_their_numbers(family: str, model: Any) -> None:
    layers = find_layers(model)
    first = 1 if family == "deepseek_v3" else 0
    assert [layer.index for layer in layers] == [first, first + 1]
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    assert [layer.name for layer in layers] == [f"model.layers.{first + i}.{block}" for i in range(2)]
    assert all((layer.num_experts, layer.top_k) == (8, 2) for layer in layers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_receive_only_allowed_ids(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    layers = attach(model).layers
    received: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    outcomes: dict[int, Any] = {}

    def spy(place: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            _, ids_NK, weights_NK = (*args, *kwargs.values())
            received[place] = (ids_NK, weights_NK)

        return hook

    for place, layer in enumerate(layers):
        layer.experts.register_forward_pre_hook(spy(place), with_kwargs=True)

    def observe(place: int, batch: carpool.Batch, outcome: carpool.Outcome) -> None:
        outcomes[place] = outcome

    with carpool.share(model, "xshare(budget=3, warmup=0)", exempt_prefill=False, observe=observe) as run:
        shared = logits(model, tokens())
    assert shared.isfinite().all()
    assert run.changed_rows() > 0
    for place, layer in enumerate(layers):
        (ids_NK, weights_NK), outcome = received[place], outcomes[place]
        assert int(outcome.coreset_GE.sum()) == 3
        assert outcome.changed_N.any()
        assert outcome.coreset_GE[0][ids_NK.long()].all(), layer.name
        assert run.report()[place].rows_changed == int(outcome.changed_N.sum())
        # weights in the model's own convention and dtype
        assert weights_NK.dtype == outcome.routing.weights_NK.dtype
        spec = layer.spec
        if spec.renormalize or spec.scoring == "softmax_after_topk":
            torch.testing.assert_close(weights_NK.float().sum(-1), torch.full((28,), spec.scaling), rtol=1e-2, atol=0)
        else:
            assert (weights_NK.float().sum(-1) < 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_and_off_are_bit_identical(family: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model(family, dtype=dtype), tokens()
    stock = logits(model, ids)
    attach(model)
    assert torch.equal(logits(model, ids), stock), "attached, off"
    for identity in ("oea(k0=2)", "xshare(budget=8)", "topk(k=2)"):
        with carpool.share(model, identity, exempt_prefill=False) as run:
            assert torch.equal(logits(model, ids), stock), identity
        assert run.changed_rows() == 0
    with carpool.share(model, "topk(k=1)", exempt_prefill=False) as run:
        assert not torch.equal(logits(model, ids), stock)
    assert torch.equal(logits(model, ids), stock), "after leaving"


def test_generate_exempts_the_prompt_and_shares_while_decoding(model: Any) -> None:
    ids = tokens()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 63}
    stock = model.generate(ids, **settings)
    with carpool.share(model, "xshare(budget=2, warmup=0)") as run:
        model.generate(ids, **settings)
    report = run.report()
    assert run.changed_rows() > 0
    assert all(row.rows_exempt == ids.numel() for row in report)
    assert all(row.rows == ids.numel() + 4 * (row.calls - 1) for row in report)
    assert torch.equal(model.generate(ids, **settings), stock)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_rule_is_refused(family: str, dtype: torch.dtype) -> None:
    layer = find_layers(tiny_model(family, dtype=dtype))[0]
    check_on_random(layer)
    wrong_scale = replace(layer, spec=replace(layer.spec, scaling=layer.spec.scaling * 1.1))
    with pytest.raises(CarpoolError, match=f"{type(layer.router).__name__} weighs experts otherwise"):
        check_on_random(wrong_scale)
    bias_E = torch.linspace(-2, 2, 8)
    with pytest.raises(CarpoolError, match=f"{type(layer.router).__name__} picks other experts"):
        check_on_random(replace(layer, spec=replace(layer.spec, bias_E=bias_E)))


def test_real_logits_are_checked_too(model: Any) -> None:
    def forward_under_a_wrong_rule() -> None:
        with carpool.share(model, "topk(k=1)", exempt_prefill=False) as run:
            run.layers[1] = replace(run.layers[1], spec=replace(run.layers[1].spec, scaling=3.0))
            logits(model, tokens())

    with pytest.raises(CarpoolError, match=f"{find_layers(model)[1].name}.*weighs experts otherwise"):
        forward_under_a_wrong_rule()


def test_ties_and_non_finite_rows_pass_the_check() -> None:
    layer = find_layers(tiny_model("mixtral"))[0]
    tied_NE = torch.zeros(3, 8)
    native = layer.spec.native(tied_NE)
    other = carpool.Routing(7 - native.ids_NK, native.weights_NK)
    check(layer, tied_NE, other)
    check(layer, tied_NE.fill_(torch.nan), other)
