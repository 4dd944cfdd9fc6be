"""Evaluation of block diffusion: the parallel pass against block-by-block denoising, and what is counted."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_tools import MASK, TOP_K, exact_model, prompt
from rich.console import Console

from carpool import CarpoolError, Grouping, parse, share
from carpool.cli.block_table import show_blocks
from carpool.diffusion import Decoding, Session, generate
from carpool.evaluate import lockstep, loop
from carpool.evaluate.block_study import BlockSettings, as_dict, block_study
from carpool.evaluate.decoded import metrics
from carpool.evaluate.denoising import RATIOS, BlockLayout, denoise, noise
from carpool.evaluate.generations import FIELDS, agreement, decode
from carpool.evaluate.sequences import Sequences
from carpool.evaluate.study import describe

P, D, L = 8, 12, 4


@pytest.fixture(scope="module")
def model() -> Any:
    return exact_model()


def some_sequences(count: int) -> Sequences:
    ids = torch.randint(3, MASK, (count, P + D + 1), generator=torch.Generator().manual_seed(3))
    return Sequences(ids, torch.arange(count) % 2, ("code", "prose"), count // 2)


def layout_of(rows: int, group: str = "request") -> BlockLayout:
    return BlockLayout.of(rows, P, D, L, Grouping.parse(group))


def settings(**changes: Any) -> BlockSettings:
    given: dict[str, Any] = {
        "plans": (parse("des_seq(k0=1)"),), "grouping": Grouping.parse("request"), "batch_sizes": (2,),
        "decoding": Decoding(L, MASK, threshold=0.15, max_new=D), "prompt": P, "batches": 2,
    }  # fmt: skip
    return BlockSettings(**(given | changes))


# denoising held-out text


@pytest.mark.parametrize("plan", ["topk(k=2)", "des_seq(k0=1)", "des_vote(size=3)"])
@pytest.mark.parametrize("group", ["request", "batch"])
def test_one_pass_is_denoising_block_by_block(model: Any, plan: str, group: str) -> None:
    layout, sequences = layout_of(2, group), some_sequences(4)
    drawn = noise(4, layout, 0)
    ids_SD = sequences.ids_ST[:, P : P + D]
    noisy_SD = ids_SD.masked_fill(drawn.masked_SD, MASK)
    given_SX = torch.cat([sequences.ids_ST[:, : layout.prefill], noisy_SD], 1)
    run = lockstep.forward(model, parse(plan), given_SX, layout, num_layers=2)
    found_RV, layers_LFM = run.logits_RV[drawn.masked_SD.flatten()], run.layers_LFM
    expected_SDV = torch.zeros(4, D, 64, dtype=torch.float64)
    unions = torch.zeros(2, 2)
    for batch in range(2):
        rows = slice(2 * batch, 2 * batch + 2)
        seen: list[tuple[int, int]] = []
        with share(model, plan, group=group,
                   observe=lambda layer, rows, outcome, seen=seen: seen.append((layer, int(outcome.union_SE.sum())))
                   ) as run:  # fmt: skip
            session = Session(model, list(sequences.ids_ST[rows, :P]), L, run=run)
            for first in range(0, D, L):
                here = slice(first, first + L)
                seen.clear()
                expected_SDV[rows, here] = session.denoise(noisy_SD[rows, here])
                for layer, union in seen:
                    unions[layer, batch] += union
                session.commit(ids_SD[rows, here])
    assert (found_RV - expected_SDV[drawn.masked_SD]).abs().max() < 1e-9
    assert torch.equal(layers_LFM[:, lockstep.LAYER_FIELDS.index("union")].float(), unions)


def test_masks_of_every_block() -> None:
    layout = BlockLayout.of(3, 32, 64, 8, Grouping.parse("request"))
    drawn = noise(5, layout, 1)
    counts = drawn.masked_SD.view(5, 8, 8).sum(-1)
    ratios = torch.tensor(RATIOS)[drawn.ratio_SD.view(5, 8, 8)[..., 0]]
    assert torch.equal(counts, (ratios * 8).round().long())
    assert all(set(row.tolist()) == set(RATIOS) for row in ratios)
    assert not torch.equal(noise(5, layout, 2).masked_SD, drawn.masked_SD)
    assert (noise(5, BlockLayout.of(1, 2, 4, 2, Grouping("request")), 1).masked_SD.view(5, 2, 2).sum(-1) > 0).all()


def test_denoising_losses_by_hand(model: Any) -> None:
    layout, sequences = layout_of(2), some_sequences(4)
    stock, shared = denoise(model, describe(model), [parse("topk(k=1)")], sequences, layout, 2, MASK)
    drawn = noise(4, layout, 0)
    nll = kl = 0.0
    for row in range(4):
        for first in range(0, D, L):
            logits = []
            for plan in ("topk(k=2)", "topk(k=1)"):
                with share(model, plan) as run:
                    session = Session(model, [sequences.ids_ST[row, : P + first]], L, run=run)
                    masked = drawn.masked_SD[row, first : first + L]
                    tokens = sequences.ids_ST[row, P + first : P + first + L]
                    logits.append(session.denoise(tokens.masked_fill(masked, MASK)[None])[0].log_softmax(-1))
            p, q = logits
            nll -= float(q[masked].gather(-1, tokens[masked, None]).sum())
            kl += float((p.exp() * (p - q))[masked].sum())
    assert float(shared.measured.nll_MD.sum()) == pytest.approx(nll, rel=1e-4)
    assert float(shared.measured.kl_M.sum()) == pytest.approx(kl, rel=1e-3)
    assert shared.measured.tokens_M.sum() == drawn.masked_SD.sum()
    assert sum(tokens for tokens, _, _ in shared.by_ratio.values()) == drawn.masked_SD.sum()
    assert sum(one_kl for _, one_kl, _ in shared.by_ratio.values()) == pytest.approx(kl, rel=1e-3)
    assert not stock.measured.kl_M.any()
    assert stock.measured.changed_rows == 0 < shared.measured.changed_rows


def test_stacking_passes_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (model, describe(model), [parse("des_vote(size=3)")], some_sequences(6), layout_of(2, "batch"), 3, MASK)
    together = denoise(*given)
    monkeypatch.setattr(loop, "ROWS_PER_PASS", 1)
    apart = denoise(*given)
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.measured.nll_MD, other.measured.nll_MD, rtol=1e-9)
        for name in one.measured.layers:
            np.testing.assert_allclose(one.measured.layers[name], other.measured.layers[name], rtol=1e-9)


# decoding prompts


def test_what_decoding_reads_and_keeps(model: Any) -> None:
    prompts, decoding = [prompt(P, seed) for seed in range(4)], Decoding(L, MASK, threshold=0.15, max_new=D)
    plan = "des_vote(size=2)"
    stock, shared = decode(
        model, describe(model), [parse(plan)], prompts, decoding, 2, group="request", judge=model, follow=True
    )
    by_hand = dict.fromkeys(FIELDS, 0.0)
    made = []
    for first in (0, 2):
        part = prompts[first : first + 2]
        base = generate(Session(model, part, L), part, decoding)
        with share(model, plan, group="request") as run:
            session = Session(model, part, L, run=run)
            before = run.report()
            one = generate(session, part, decoding)
            for layer, start in zip(run.report(), before, strict=True):
                by_hand["all_unions"] = by_hand.get("all_unions", 0) + layer.union - start.union
                by_hand["changed"] += layer.rows_changed - start.rows_changed
        made.append(one)
        same, total = agreement(one.tokens, base.tokens)
        by_hand["same"] += same
        by_hand["tokens"] += total
        for text, tokens in zip(part, one.tokens, strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.cat([text, tokens])[None], use_cache=False).logits[0]
            for place, token in enumerate(tokens.tolist()):
                by_hand["judge_nll"] -= float(logits[len(text) + place - 1].float().log_softmax(-1)[token])
    sums = {name: float(values.sum()) for name, values in shared.sums.items()}
    assert sums["union"] + sums["commit_union"] == by_hand["all_unions"]
    for name in ("changed", "same", "tokens"):
        assert sums[name] == by_hand[name]
    assert sums["judge_nll"] == pytest.approx(by_hand["judge_nll"], rel=1e-5)
    assert sums["judged"] == sums["tokens"] == 4 * D
    assert sums["forwards"] == sum(len(one.forwards) for one in made)
    assert sums["layer_forwards"] == 2 * sums["forwards"]
    assert sums["layer_commits"] == 2 * sum(one.commits for one in made)
    assert shared.by_masked.sum(0).tolist() == [sums["group_union"], sums["groups"]]
    assert shared.by_masked[-1, 1] > 0, "a block begins with nothing but masks"
    assert 0 < sums["followed_same"] < sums["followed"]
    first, second = metrics([stock, shared])
    assert (first.agreement.value, first.equal, first.union_share.value) == (1.0, 1.0, 1.0)
    assert second.union.value <= 4, "two requests of two experts"
    assert second.union_of_group.value == 2 < first.union_of_group.value
    alone = [decode(model, describe(model), [parse(plan)], [one], decoding, 1, group="request") for one in prompts]
    sums_alone = [sum(float(each[1].sums[name].sum()) for each in alone) for name in ("union", "layer_forwards")]
    assert second.union_of_group.value == pytest.approx(sums_alone[0] / sums_alone[1]), "what each reads alone"
    assert not any(each[1].sums["followed"].any() for each in alone), "after stock's text only where that is asked for"
    assert second.agreement.value == pytest.approx(by_hand["same"] / by_hand["tokens"])
    assert second.tokens_per_forward.value == pytest.approx(sums["accepted"] / sums["request_forwards"])
    assert second.perplexity is not None
    assert second.perplexity.value == pytest.approx(np.exp(by_hand["judge_nll"] / sums["judged"]), rel=1e-5)


def test_an_identity_agrees_everywhere(model: Any) -> None:
    prompts, decoding = [prompt(P, seed) for seed in range(2)], Decoding(L, MASK, threshold=0.15, max_new=D)
    found = decode(
        model, describe(model), [parse(f"des_seq(k0={TOP_K})")], prompts, decoding, 2, group="request", follow=True
    )
    [_, same] = metrics(found)
    assert (same.agreement.value, same.agreed_prefix.value, same.equal, same.displaced_mass.value) == (1, 1, 1, 0)
    assert same.followed_agreement is not None
    assert same.followed_agreement.value == 1
    assert found[1].changed_rows == 0


def test_agreement_counts_what_is_missing() -> None:
    one, other = torch.tensor([1, 2, 3]), torch.tensor([1, 5])
    assert agreement([one, other], [other, other]) == (1 + 2, 3 + 2)


# the whole


def test_a_study_as_a_table_and_as_json(model: Any) -> None:
    [rows] = block_study(model, settings(), [some_sequences(4)], judge=model)
    assert [row.name for row in rows] == ["stock", "des_seq(k0=1)"]
    content = json.loads(json.dumps([as_dict(row) for row in rows], allow_nan=False))
    assert content[1]["decoding"]["union"]["value"] < content[0]["decoding"]["union"]["value"]
    assert content[1]["group"] == "request"
    assert content[1]["masked_tokens"] == sum(one["tokens"] for one in content[1]["by_masked_ratio"].values())
    assert content[0]["decoding"]["agreement"]["value"] == 1
    console = Console(width=200, record=True, file=io.StringIO())
    show_blocks(console, [rows])
    assert "blocks of 4, threshold 0.15, batch 2, grouped by request" in console.export_text()


def test_studies_that_cannot_be(model: Any) -> None:
    with pytest.raises(CarpoolError, match="changed no row"):
        block_study(model, settings(plans=(parse("topk(k=2)"),)), [some_sequences(4)])
    block_study(model, settings(plans=(parse("topk(k=2)"),), allow_unchanged=True), [some_sequences(4)])
    with pytest.raises(CarpoolError, match="do not split into blocks of 4"):
        settings(prompt=6)
    with pytest.raises(CarpoolError, match="do not split into blocks of 8"):
        settings(decoding=Decoding(8, MASK, max_new=12))
    with pytest.raises(CarpoolError, match="use request or batch"):
        settings(grouping=Grouping.parse("position"))
    with pytest.raises(CarpoolError, match="no policy"):
        settings(plans=())
    with pytest.raises(CarpoolError, match="--batches 0"):
        settings(batches=0)
    with pytest.raises(CarpoolError, match="asks for 9 of 8"):
        block_study(model, settings(plans=(parse("des_vote(size=9)"),)), [some_sequences(4)])
