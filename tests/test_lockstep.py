"""One parallel pass computes what decoding step by step computes; and the check notices where it does not."""

import dataclasses
from pathlib import Path

import pytest
import torch
from lockstep_tools import VOCABULARY, small_model
from tiny_models import tiny_model, tokens

from carpool.errors import CarpoolError
from carpool.evaluate import check, lockstep
from carpool.evaluate.check import check_lockstep, in_float64
from carpool.evaluate.layout import Layout
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

REFERENCE = Path(__file__).parents[1] / "demo/src/carpool_demo/model"
POLICIES = (
    "xshare(budget=3)",
    "oea(k0=1)",
    "des_vote(size=3)",
    "topk(k=1)",
    "random(budget=3)",
    "oea(k0=1) | floor(0.3)",
)
BLOCK = Layout(4, 11, 3, Grouping.parse("batch"))


def layout(group: str) -> Layout:
    return dataclasses.replace(BLOCK, grouping=Grouping.parse(group), samples=2 if group == "prompt" else 1)


@pytest.mark.parametrize("group", ["batch", "position", "request", "block:4"])
def test_rows_by_hand(group):
    """Two copies of two sequences of three positions, one of them prompt: every row's step and group."""
    made = Layout(2, 3, 1, Grouping.parse(group if group != "block:4" else "block:2"))
    batch = made.batch(2)
    stride = made.stride
    for index in range(12):
        copy, row, position = index // 6, index // 3 % 2, index % 3
        own = made.steps if position == 0 else (position - 1) // stride
        step = copy * (made.steps + 1) + own
        assert batch.step_N[index] == step
        assert batch.exempt_N[index] == (position == 0)
        assert batch.voter_N[index] == (position > 0)
        assert batch.group_N[index] == (step if made.groups == 1 else step * 2 + row)
    assert batch.num_steps == 2 * (made.steps + 1)
    assert batch.num_groups == batch.num_steps * made.groups
    assert int(batch.group_N.max()) < batch.num_groups


def test_siblings_are_a_group() -> None:
    """Two prompts of two samples of two positions: by hand."""
    made = Layout(4, 2, 1, Grouping.parse("prompt"), samples=2)
    batch = made.batch(1)
    assert batch.group_N.tolist() == [2, 0, 2, 0, 3, 1, 3, 1]
    assert (batch.num_groups, batch.num_steps) == (4, 2)
    assert made.by_step(torch.arange(4), 1).tolist() == [1]


@pytest.mark.parametrize("group", ["batch", "prompt", "request", "block:4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_equals_decoding_in_float64(family, group):
    model = tiny_model(family)
    ids = tokens(4, 11)
    with in_float64(model):
        for policy in POLICIES:
            found = check_lockstep(model, parse(policy), ids, layout(group))
            assert found.dtype == "float64"
            assert found.max_error < 1e-10, policy
            assert found.flips == 0, policy
            assert found.pairs == 2 * 4 * 8
    assert model.dtype == torch.float32
    assert check_lockstep(model, parse("oea(k0=1)"), ids, layout(group)).max_error < 1e-3


def test_the_check_sees_a_wrong_group(monkeypatch):
    """Negative control: the parallel pass shares by request while decoding shares by batch."""
    model = small_model()
    honest = check._lockstep
    monkeypatch.setattr(check, "_lockstep", lambda m, p, i, _, s: honest(m, p, i, layout("request"), s))
    found = check_lockstep(model, parse("oea(k0=1)"), tokens(4, 11), layout("batch"))
    assert found.max_error > 1e-2
    assert found.flips > 0
    assert found.mean_kl > 1e-4


def test_prompts_are_free_for_nobody():
    """The same decoded rows under the same policy read the same, whatever their prompts read."""
    model, plan, ids = small_model(), parse("oea(k0=1)"), tokens(4, 11)
    run = lockstep.forward(model, plan, ids, layout("batch"), num_layers=2)
    union_LM = run.layers_LFM[:, lockstep.LAYER_FIELDS.index("union")]
    coreset_LM = run.layers_LFM[:, lockstep.LAYER_FIELDS.index("coreset")]
    assert torch.equal(union_LM, coreset_LM)  # OEA reads its coreset and nothing else
    assert bool((union_LM <= 4 * BLOCK.steps).all())  # at most one expert a row


def test_refuses_a_policy_that_did_not_run_everywhere():
    with pytest.raises(CarpoolError, match="ran in 2 of 3 MoE layers"):
        lockstep.forward(small_model(), parse("oea(k0=1)"), tokens(4, 11), BLOCK, num_layers=3)


def test_compare_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    stock_RV = torch.randn(5, VOCABULARY, generator=generator)
    policy_RV = stock_RV + torch.randn(5, VOCABULARY, generator=generator)
    targets_R = torch.arange(5)
    found = lockstep.compare(stock_RV, policy_RV, targets_R)
    for row in range(5):
        p, q = (torch.distributions.Categorical(logits=x[row].double()) for x in (stock_RV, policy_RV))
        assert found.kl_R[row] == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-4)
        assert found.nll_R[row] == pytest.approx(-float(q.log_prob(targets_R[row])), rel=1e-4)
        assert found.agree_R[row] == float(stock_RV[row].argmax() == policy_RV[row].argmax())
    same = lockstep.compare(stock_RV, stock_RV, targets_R)
    assert float(same.kl_R.abs().sum()) == 0
    assert float(same.agree_R.sum()) == 5


def test_compare_refuses_nan():
    logits_RV = torch.zeros(2, 8)
    bad_RV = logits_RV.clone()
    bad_RV[1, 3] = float("nan")
    with pytest.raises(CarpoolError, match="not finite"):
        lockstep.compare(logits_RV, bad_RV, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch 0"),
        ({"prefill": 0}, "prefill 0"),
        ({"positions": 3}, "leave nothing to decode"),
        ({"grouping": Grouping.parse("block:3")}, "do not split into blocks of 3"),
        ({"grouping": Grouping.parse("tenant")}, "have no tenants"),
        ({"grouping": Grouping.parse("prompt")}, "none is another's sample"),
        ({"grouping": Grouping.parse("prompt"), "samples": 3}, "does not split into prompts of 3"),
        ({"samples": 0}, "does not split into prompts of 0"),
    ],
)
def test_impossible_layouts(changes, message):
    with pytest.raises(CarpoolError, match=message):
        dataclasses.replace(BLOCK, **changes)


@pytest.mark.slow
@pytest.mark.skipif(
    not (REFERENCE / "model.safetensors").is_file(), reason="the reference model is not in this checkout"
)
def test_reference_model_equals_decoding():
    from carpool.hosts.transformers import load_model

    model, _ = load_model(REFERENCE)
    ids = torch.randint(2, 8192, (4, 24), generator=torch.Generator().manual_seed(0))
    wide = Layout(4, 24, 8, Grouping.parse("batch"))
    with in_float64(model):
        for policy in ("xshare(budget=16)", "oea(k0=2)"):
            found = check_lockstep(model, parse(policy), ids, wide)
            assert found.max_error < 1e-9
            assert found.flips == 0
