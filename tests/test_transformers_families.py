"""Every family of the transformers host: found, checked, re-routed inside the coreset, untouched otherwise."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_matrix import NAMES, measure
from tiny_models import FAMILIES, REFUSED, tiny_model, tokens
from torch import nn

import carpool
from carpool import CarpoolError
from carpool.hosts.transformers import find_layers
from carpool.hosts.transformers.families import RULES, known_families
from carpool.hosts.transformers.refused import REFUSED as REASONS
from carpool.hosts.transformers.router_check import check, check_on_random

MATRIX = json.loads((Path(__file__).parent.parent / "docs/results/families.json").read_text())
PROMISES = ("conforms", "off_identical", "identity_identical", "only_allowed", "weights_add_up", "stock_afterwards")
COMMITTED = ("family", "model", "router", "rule", "note", "rows", *PROMISES)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def assert_as_committed(name: str, dtype: torch.dtype) -> None:
    row = measure(name, dtype)
    assert {key: row[key] for key in PROMISES} == dict.fromkeys(PROMISES, True)
    assert row["changed_rows"] > 0
    committed = next(r for r in MATRIX["rows"] if (r["name"], r["dtype"]) == (name, row["dtype"]))
    assert {key: committed[key] for key in COMMITTED} == {key: row[key] for key in COMMITTED}, (
        "run benchmarks/families.py"
    )


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str) -> None:
    assert_as_committed(name, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_family_in_bf16(name: str) -> None:
    assert_as_committed(name, torch.bfloat16)


def test_the_matrix_has_every_family_and_nothing_else() -> None:
    rows = MATRIX["rows"]
    assert {row["family"] for row in rows} == set(known_families())
    assert {row["router"] for row in rows} == set(RULES)
    assert sorted((row["name"], row["dtype"]) for row in rows) == sorted(
        (name, dtype) for name in NAMES for dtype in ("float32", "bfloat16")
    )
    refused = {row["module"]: (row["family"], row["reason"]) for row in MATRIX["refused"]}
    assert refused == {module: (refusal.family, refusal.reason) for module, refusal in REASONS.items()}


def test_every_moe_model_of_transformers_is_known_or_refused() -> None:
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        if re.search(r"^class \w*(?:Experts|CDMoE|SparseM\w+|Moe|MoE)\(", path.read_text(), re.M):
            found.add(path.parent.name)
    listed = {*known_families(), *(refusal.family for refusal in REASONS.values())}
    assert found - listed == set(), "read their routers and add a rule or a refusal"
    assert listed - found == set()


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str) -> None:
    with torch.device("meta"):
        model = tiny_model(family, **REFUSED[family])
    name = family.removesuffix("_text").replace("-", "_")
    with pytest.raises(CarpoolError, match=f"does not share {name}: .*; run this model without a policy") as refusal:
        find_layers(model)
    assert "\n" not in str(refusal.value)


def test_every_refusal_is_tested() -> None:
    assert {refusal.family for refusal in REASONS.values()} == {
        family.removesuffix("_text").replace("-", "_") for family in REFUSED
    }


class Block(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, nn.ModuleList()


def test_other_routers_are_refused() -> None:
    class NewRouter(nn.Module):
        pass

    with pytest.raises(CarpoolError, match="0 is a NewRouter, a router Carpool does not know; use a model"):
        find_layers(nn.ModuleList([Block(NewRouter())]))
    with pytest.raises(CarpoolError, match="0 routes inside its own forward"):
        find_layers(nn.ModuleList([Block(nn.Linear(4, 8))]))
    parts = nn.ModuleDict({"thinker": tiny_model("qwen3_moe"), "talker": tiny_model("qwen3_moe")})
    with pytest.raises(CarpoolError, match=r"thinker\..*0\.mlp and talker\..*0\.mlp have the same layer number"):
        find_layers(parts)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return tiny_model(family)


def test_layers_are_found_with_their_numbers(family: str, model: Any) -> None:
    layers = find_layers(model)
    first = 1 if family == "deepseek_v3" else 0
    assert [layer.index for layer in layers] == [first, first + 1]
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    assert [layer.name for layer in layers] == [f"model.layers.{first + i}.{block}" for i in range(2)]
    assert all((layer.num_experts, layer.top_k) == (8, 2) for layer in layers)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
