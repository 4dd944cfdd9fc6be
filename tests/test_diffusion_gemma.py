"""DiffusionGemma in the transformers host: denoising passes are shared, a canvas is a request, finished ones are mute.

Tiny random weights: mechanics only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import carpool
from carpool import CarpoolError, Grouping
from carpool.doctor import diagnose
from carpool.hosts.transformers import Known, attach, find_layers
from carpool.hosts.transformers.denoising import watch
from carpool.hosts.transformers.forward_rows import RowRules, build_batch
from carpool.hosts.transformers.here import Here
from carpool.hosts.transformers.loading import open_model

CANVAS, EXPERTS, TOP_K = 8, 8, 2
PAD, EOS = 0, 2
SETTINGS = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 5, "pad_token_id": PAD}


@pytest.fixture
def model() -> Any:
    return tiny_model("diffusion_gemma")


def generate(model: Any, prompts_BP: Tensor, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(input_ids=prompts_BP, **(SETTINGS | settings))


class Sure(LogitsProcessor):
    """Makes one row of the batch sure of one token; the others generate neither end nor padding."""

    def __init__(self, row: int, token: int) -> None:
        self.row, self.token = row, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sure = scores.clone()
        sure[..., [PAD, EOS]] = -1e3
        sure[self.row] = -1e3
        sure[self.row, :, self.token] = 1e3
        return sure


def test_only_the_decoder_is_shared(model: Any) -> None:
    assert [layer.name for layer in find_layers(model)] == [f"model.decoder.layers.{i}" for i in range(2)]
    assert [layer.name for layer in find_layers(model.model.decoder)] == ["layers.0", "layers.1"]
    prompts_BP, passes = tokens(2, 5), 2 * SETTINGS["max_denoising_steps"]
    with carpool.share(model, "des_vote(size=2)", group="request") as run:
        generate(model, prompts_BP)
    for row in run.report():
        assert (row.calls, row.rows, row.rows_exempt) == (passes, passes * 2 * CANVAS, 0)
        assert row.rows_changed > 0


@pytest.mark.parametrize("group", ["request", "batch", "block:4"])
@pytest.mark.parametrize("plan", ["des_vote(beta=1.0)", f"des_seq(k0={TOP_K})", f"des_vote(size={EXPERTS})"])
def test_identity_settings_generate_the_same_tokens(model: Any, plan: str, group: str) -> None:
    prompts_BP = tokens(3, 5)
    stock = generate(model, prompts_BP).sequences
    with carpool.share(model, plan, group=group) as run:
        assert torch.equal(generate(model, prompts_BP).sequences, stock)
    assert run.changed_rows() == 0
    with carpool.share(model, "des_vote(size=2)", group=group) as run:
        assert not torch.equal(generate(model, prompts_BP).sequences, stock)
    assert torch.equal(generate(model, prompts_BP).sequences, stock)


@pytest.mark.parametrize(("group", "groups"), [("request", 3), ("block:4", 6), ("batch", 1)])
def test_a_group_reads_no_more_than_its_coreset(model: Any, group: str, groups: int) -> None:
    size, seen = 3, []

    def observe(_: int, batch: Any, outcome: Any) -> None:
        read_GE = batch.group_any(outcome.computed_NE)
        used = batch.group_N.unique()
        seen.append((len(used), int(read_GE.sum(-1).max()), int(outcome.natural_SE.sum())))

    with carpool.share(model, f"des_vote(size={size})", group=group, observe=observe):
        generate(model, tokens(3, 5))
    assert all(found == groups and read <= size for found, read, _ in seen)
    assert max(natural for *_, natural in seen) > size


def test_experts_implementations_agree(model: Any) -> None:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in ("eager", "grouped_mm"):
        model.set_experts_implementation(kind)
        unions: list[Tensor] = []
        how: Any = {"group": "request", "observe": lambda _, batch, seen, unions=unions: unions.append(seen.union_SE)}
        with carpool.share(model, "des_vote(size=3)", **how):
            found[kind] = (generate(model, tokens(2, 5)).sequences, torch.cat(unions))
    for one, other in zip(found["eager"], found["grouped_mm"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("token", "canvases"), [(5, 2), (EOS, 1)])
def test_finished_canvases_do_not_vote(model: Any, token: int, canvases: int) -> None:
    """Against transformers' own count of the passes that a request needed; an end token ends the whole sequence."""
    voted: list[Tensor] = []

    def observe(place: int, batch: Any, _: Any) -> None:
        if place == 0:
            voted.append(batch.voter_N.reshape(3, CANVAS))

    sure = LogitsProcessorList([Sure(1, token)])
    with carpool.share(model, "des_vote(size=2)", group="request", observe=observe):
        output = generate(model, tokens(3, 5), logits_processor=sure, eos_token_id=EOS)
    votes_B = torch.stack(voted).sum((0, 2)) / CANVAS
    kept_B = (output.sequences[:, 5:] != PAD).sum(-1)
    assert torch.equal(votes_B, (kept_B / output.tokens_per_forward).round())
    assert votes_B.tolist() == [10, 2 * canvases, 10], "sure of its tokens in the second pass"


def test_a_new_generation_starts_with_nobody_finished(model: Any) -> None:
    prompts_BP, seen = tokens(2, 5), []
    observe = lambda _, batch, __: seen.append(batch.voter_N)  # noqa: E731
    with carpool.share(model, "des_vote(size=2)", group="request", observe=observe):
        sure = LogitsProcessorList([Sure(0, EOS)])
        generate(model, prompts_BP, logits_processor=sure, max_new_tokens=CANVAS, eos_token_id=EOS)
        seen.clear()
        generate(model, prompts_BP, max_new_tokens=CANVAS, max_denoising_steps=1)
    assert torch.stack(seen).all()


def canvases(group: str, finished: list[bool] | None) -> Any:
    known = None if finished is None else Known(finished=torch.tensor(finished))
    return build_batch(RowRules(Grouping.parse(group)), (), {"decoder_input_ids": torch.ones(3, 4).long()}, known)


def test_rows_of_canvases() -> None:
    everyone = canvases("request", None)
    assert everyone.group_N.tolist() == everyone.request_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert everyone.voter_N.all()
    assert not everyone.exempt_N.any()
    assert not everyone.prefill_N.any()
    riding = canvases("request", [True, False, True])
    assert riding.group_N.tolist() == [1] * 12, "finished canvases ride on one that is not"
    assert riding.request_N.tolist() == everyone.request_N.tolist()
    assert riding.voter_N.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    blocks = canvases("block:2", [False, True, False]).group_N.reshape(3, 2, 2)
    assert torch.equal(blocks[1], blocks[0])
    assert len(blocks.unique()) == 4
    assert not canvases("request", [True] * 3).voter_N.any()
    with pytest.raises(CarpoolError, match="one step for all positions"):
        canvases("position", None)


def test_what_a_finished_canvas_holds_changes_nothing(model: Any) -> None:
    def routed(change: Callable[[Tensor], None]) -> Tensor:
        logits_NE = torch.randn(12, EXPERTS, generator=torch.Generator().manual_seed(0))
        change(logits_NE)
        batch = canvases("request", [False, True, False])
        spec = carpool.RouteSpec(top_k=TOP_K)
        return carpool.route(carpool.parse("des_vote(size=2)"), spec, logits_NE, batch).routing.ids_NK

    stock, changed = routed(lambda _: None), routed(lambda logits_NE: logits_NE[4:8].neg_())
    assert torch.equal(stock[:4], changed[:4])
    assert torch.equal(stock[8:], changed[8:])


@torch.no_grad()
def test_the_decoder_may_be_called_by_itself(model: Any) -> None:
    cache = DynamicCache(config=model.config.text_config)
    model.model.encoder(input_ids=tokens(2, 5), past_key_values=cache)
    with carpool.share(model, "des_vote(size=2)", group="request") as run:
        model.model.decoder(decoder_input_ids=tokens(2, CANVAS), past_key_values=cache)
    assert run.changed_rows() > 0


def test_a_copy_watches_itself(model: Any) -> None:
    attach(model)
    twin = copy.deepcopy(model)
    with carpool.share(twin, "des_vote(size=2)", group="request") as run:
        generate(twin, tokens(2, 5))
    assert run.changed_rows() > 0
    with carpool.share(model, "des_vote(size=2)", group="request"):
        stock = generate(model, tokens(2, 5)).sequences
    with carpool.share(twin, "des_vote(size=2)", group="request"):
        assert torch.equal(generate(twin, tokens(2, 5)).sequences, stock)
    assert twin.__dict__["_denoising_step"].model is twin
    assert twin.__dict__["_denoising_step"].here is attach(twin).here is not attach(model).here


def test_commands_that_predict_next_tokens_refuse_it(model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CarpoolError, match=r"denoises canvases .* around model\.generate"):
        open_model(tmp_path)
    assert diagnose(tmp_path).moe_layers == 2


def test_another_denoising_loop_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(autoregressive := tiny_model("qwen3_moe"), Here())
    assert "_denoising_step" not in autoregressive.__dict__
    monkeypatch.setattr(type(model), "_denoising_step", lambda self, input_ids: None, raising=False)
    with pytest.raises(CarpoolError, match=r"_denoising_step of this transformers has no parameter 'finished_denois"):
        attach(model)
