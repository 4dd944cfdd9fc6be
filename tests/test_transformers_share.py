"""`share`: entering and leaving, the traps of hooks, padding, finished sequences, compiling, continuous batching."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens

import carpool
from carpool import Batch, CarpoolError, Outcome, parse
from carpool.hosts.transformers import Known, attach, find_layers
from carpool.plans.policy_file import PolicyFile

TIGHT = "xshare(budget=2, warmup=0)"


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def run_once(
    model: Any, plan: str | PolicyFile = TIGHT, ids: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    with carpool.share(model, plan, **{"exempt_prefill": False, **options}):
        return logits(model, tokens() if ids is None else ids)


def test_attach_is_idempotent_and_follows_a_copy(model: Any) -> None:
    attachment = attach(model)
    assert attach(model) is attachment
    assert len(model.model.layers[0].mlp.gate._forward_hooks) == 1
    twin = copy.deepcopy(model)
    assert attach(twin) is not attachment
    stock = logits(model, tokens())
    with carpool.share(model, TIGHT, exempt_prefill=False):
        assert torch.equal(logits(twin, tokens()), stock)
        assert not torch.equal(logits(model, tokens()), stock)
    assert not torch.equal(run_once(twin), stock)


def test_attach_again_after_a_router_was_replaced(model: Any) -> None:
    attachment = attach(model)
    model.model.layers[0].mlp.gate = copy.deepcopy(model.model.layers[1].mlp.gate)
    assert attach(model) is not attachment
    assert run_once(model).isfinite().all()


def test_an_exception_restores_stock(model: Any) -> None:
    stock = logits(model, tokens())
    with pytest.raises(KeyError), carpool.share(model, TIGHT):
        raise KeyError("mine")
    assert torch.equal(logits(model, tokens()), stock)
    run_once(model)


def test_nesting_is_refused_and_the_outer_block_survives(model: Any) -> None:
    with carpool.share(model, TIGHT, exempt_prefill=False) as run:
        with pytest.raises(CarpoolError, match="already shares"), carpool.share(model, "topk(k=1)"):
            pass
        logits(model, tokens())
    assert run.changed_rows() > 0


def test_the_inner_model_may_be_called_itself(model: Any) -> None:
    with torch.no_grad(), carpool.share(model, TIGHT, exempt_prefill=False) as run:
        model.model(tokens())
    assert run.changed_rows() > 0


def test_a_layer_called_alone_needs_a_batch(model: Any) -> None:
    hidden = torch.randn(2, 3, 32)
    block = model.model.layers[0].mlp
    with pytest.raises(CarpoolError, match=r"run\.batch"), carpool.share(model, TIGHT):
        block(hidden)
    run: Any = None

    def one_layer_with_its_batch() -> None:
        nonlocal run
        with torch.no_grad(), carpool.share(model, TIGHT) as run:
            run.batch = Batch.of(6)
            block(hidden)

    with pytest.raises(CarpoolError, match="never fired"):  # the other layer
        one_layer_with_its_batch()
    assert [row.calls for row in run.report()] == [1, 0]


def test_a_given_batch_is_used_and_its_size_checked(model: Any) -> None:
    seen: list[tuple[int, Batch]] = []
    batch = Batch.of(28, group_N=torch.arange(28) % 7, num_groups=7)

    def observe(place: int, batch: Batch, outcome: carpool.Outcome) -> None:
        seen.append((place, batch))
        assert outcome.coreset_GE.shape == (7, 8)

    run_once(model, batch=batch, observe=observe)
    assert seen == [(0, batch), (1, batch)]
    with pytest.raises(CarpoolError, match="routes 28 rows, but the batch has 5"):
        run_once(model, batch=Batch.of(5))


def test_positions_are_grouped_as_decoding_steps(model: Any) -> None:
    with carpool.share(model, TIGHT, group="position") as run:
        logits(model, tokens())
    row = run.report()[0]
    assert (row.calls, row.steps, row.rows_exempt) == (1, 7, 0)
    assert row.coreset == 7 * 2


def test_padding_on_the_left_changes_nothing(model: Any) -> None:
    ids = tokens(3, 6)
    alone = run_once(model, ids=ids)
    for fill in (5, 9):
        padded = torch.cat([torch.full((3, 4), fill), ids], 1)
        mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 6)], 1).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with carpool.share(model, TIGHT, exempt_prefill=False) as run:
            out = logits(model, padded, attention_mask=mask, position_ids=positions)
        assert all(row.rows == 18 for row in run.report())
        torch.testing.assert_close(out[:, 4:], alone, rtol=1e-4, atol=1e-4)


def test_finished_sequences_have_no_vote(model: Any) -> None:
    """The coresets while one sequence feeds pad tokens are those of the other sequences alone."""
    ids = tokens(3, 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        pair = model(ids[:2], use_cache=True).past_key_values
    coresets: list[torch.Tensor] = []

    def observe(place: int, batch: Batch, outcome: carpool.Outcome) -> None:
        coresets.append(outcome.coreset_GE)

    step = torch.tensor([[7], [9], [0]])
    with carpool.share(model, TIGHT, observe=observe) as run:
        run.known = Known(finished=torch.tensor([False, False, True]))
        logits(model, step, past_key_values=cache)
        run.known = None
        logits(model, step[:2], past_key_values=pair)
    assert torch.equal(coresets[0], coresets[2])
    assert torch.equal(coresets[1], coresets[3])


def test_a_replaced_block_is_caught(model: Any) -> None:
    """Negative control: a kernel that routes by itself never calls the router."""
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: torch.zeros_like(hidden)
    with pytest.raises(CarpoolError, match=r"never fired.*model\.layers\.1\.mlp.*in a forward"):
        run_once(model)


def test_an_inert_hook_is_caught(model: Any) -> None:
    """Negative control: without the routers' hooks no policy acts, and the block says so."""

    def share_nothing() -> None:
        with carpool.share(model, TIGHT, exempt_prefill=False):
            for layer in attach(model).layers:
                layer.router._forward_hooks.clear()
            logits(model, tokens())

    with pytest.raises(CarpoolError, match="never fired"):
        share_nothing()


def test_a_block_without_a_forward_is_an_error(model: Any) -> None:
    with pytest.raises(CarpoolError, match="never fired"), carpool.share(model, TIGHT):
        pass


def test_gradients_do_not_pile_up_in_the_counters(model: Any) -> None:
    with carpool.share(model, TIGHT, exempt_prefill=False) as run:
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
    assert run.changed_rows() > 0
    assert model.model.layers[0].mlp.gate.weight.grad is not None


def test_compiled_after_attach_shares_and_switches() -> None:
    """One graph without a break for stock and one for sharing, and the switch is seen."""
    model, ids = tiny_model("qwen3_moe", num_hidden_layers=1), tokens()
    stock = logits(model, ids)
    shared = run_once(model, ids=ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, ids), stock)
        with carpool.share(compiled, TIGHT, exempt_prefill=False) as run:
            torch.testing.assert_close(logits(compiled, ids), shared)
            logits(compiled, ids)
        assert [(row.layer, row.calls) for row in run.report()] == [("model.layers.0.mlp", 2)]
        assert run.changed_rows() > 0


def test_compiled_before_attach_is_caught() -> None:
    def share_too_late() -> None:
        with carpool.share(compiled, TIGHT, exempt_prefill=False):
            logits(compiled, tokens())

    torch._dynamo.reset()
    compiled = torch.compile(tiny_model("qwen3_moe", num_hidden_layers=1), backend="eager")
    logits(compiled, tokens())
    with pytest.raises(CarpoolError, match=r"never fired.*compiled before it was first shared"):
        share_too_late()


def test_router_logits_stay_raw(model: Any) -> None:
    with torch.no_grad():
        stock = model(tokens(), output_router_logits=True).router_logits
        with carpool.share(model, TIGHT, exempt_prefill=False):
            shared = model(tokens(), output_router_logits=True).router_logits
    assert torch.equal(stock[0], shared[0])


def test_continuous_batching_shares_over_requests(model: Any, tmp_path: Path) -> None:
    """Requests of a packed batch share; the generation thread sees the switch; one request alone gets the same
    tokens as `generate` under a policy that does not depend on the batch."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=63, pad_token_id=0)
    blocks = ContinuousBatchingConfig(num_blocks=16, block_size=16, max_batch_tokens=32)
    requests = tokens(3, 5).tolist()
    model.set_attn_implementation("sdpa")

    def generate() -> list[list[int]]:
        results = model.generate_batch(
            requests, generation_config=settings, continuous_batching_config=blocks, progress_bar=False
        )
        return [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.split("_")[-1]))]

    with carpool.share(model, "topk(k=1)", exempt_prefill=False) as run:
        together = generate()
    assert run.changed_rows() > 0
    for prompt, made in zip(requests, together, strict=True):
        with carpool.share(model, "topk(k=1)", exempt_prefill=False):
            alone = model.generate(torch.tensor([prompt]), generation_config=settings)
        assert alone[0, len(prompt) :].tolist() == made
    with carpool.share(model, TIGHT) as run:
        generate()
    assert all(row.rows_exempt == 15 for row in run.report())
    assert run.changed_rows() > 0


def test_policy_file_gives_layers_their_own_settings(model: Any, tmp_path: Path) -> None:
    """A policy file's settings reach the layers they are for, and another model's file is refused."""
    first, *_ = find_layers(model)
    PolicyFile(parse("oea(k0=1)"), layers={first.index: {"k0": first.top_k}}).save(tmp_path / "policy.json")
    changed: list[int] = []

    def observe(place: int, batch: Batch, outcome: Outcome) -> None:
        changed.append(int(outcome.changed_N.sum()))

    run_once(model, PolicyFile.load(tmp_path / "policy.json"), observe=observe)
    assert changed[0] == 0
    assert all(changed[1:])
    with pytest.raises(CarpoolError, match="of another model"):
        run_once(model, PolicyFile(parse("oea(k0=1)"), model={"fingerprint": "0" * 64}))
