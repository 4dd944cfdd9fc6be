"""`carpool diffuse` and `carpool evaluate --decode block-diffusion`, on a tiny model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lockstep_tools import NumberTokenizer, small_model, write_texts
from rich.console import Console
from typer.testing import CliRunner, Result

from carpool.cli import block_diffusion, diffuse
from carpool.cli.commands import app
from carpool.cli.denoising_view import MASKED, Film, picture, text_of, view
from carpool.diffusion import Decoding, Session, generate
from carpool.errors import CarpoolError

MASK = 63
SMALL = ["--batch", "2", "--batches", "2", "--sequence", "16", "--prefill", "8", "--block-size", "4"]


class Numbers(NumberTokenizer):
    """Decodes with a space after every word, as a text goes on."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{one} " for one in ids)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths = write_texts(tmp_path)
    model = small_model()
    model.config.mask_token_id = MASK
    for module in (block_diffusion, diffuse):
        monkeypatch.setattr(module, "load", lambda *given: (model, Numbers(), None))
        monkeypatch.setattr(module, "diffusion_model", lambda name: "tiny")
    monkeypatch.setattr(block_diffusion, "judge_for", lambda *given: model)
    monkeypatch.setattr(block_diffusion, "embedded_texts", lambda: paths)
    return paths


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_evaluate_block_diffusion(texts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    given = ["evaluate", "--decode", "block-diffusion", "-p", "des_seq(k0=1)", "-p", "topk(1)", *SMALL]
    done = invoke(*given, "--threshold", 0.2, "--json", out)
    assert done.exit_code == 0, done.output
    assert "blocks of 4, threshold 0.2, batch 2, grouped by request" in done.output
    content = json.loads(out.read_text())
    assert [row["policy"] for row in content["results"]] == ["stock", "des_seq(k0=1)", "topk(k=1)"]
    assert content["results"][1]["decoding"]["tokens"] == 32
    assert content["arguments"]["decode"] == "block-diffusion"
    assert content["kind"] == "carpool block diffusion"
    assert {"commit", "seed", "arguments", "texts", "model"} <= set(content)
    shown = tmp_path / "report.html"
    assert invoke("report", out, "-o", shown).exit_code == 0
    assert "What is decoded" in shown.read_text()


def test_diffuse_without_a_terminal(texts: list[Path]) -> None:
    done = invoke("diffuse", "--prompt", "5 6 7", "--prompt", "8 9", "--block-size", 4, "--max-new", 6,
                  "--policy", "topk(1)", "--threshold", 0.2, "--ignore-end")  # fmt: skip
    assert done.exit_code == 0, done.output
    blocks = [line for line in done.output.splitlines() if line.startswith("  block ")]
    assert len(blocks) == 2 * 3, "a line a block and run"
    assert all(
        re.fullmatch(r"  block \d  [ ▁-█]+  \d+ forwards accept \d+(, at most \d at once| one by one)", one)
        for one in blocks
    )
    assert MASKED not in done.output
    assert "of 12 positions hold stock's token" in done.output
    assert "tokens a forward" in done.output


def test_diffuse_shows_no_disagreement_of_an_identity(texts: list[Path]) -> None:
    done = invoke("diffuse", "--prompt", "5 6 7", "--block-size", 4, "--max-new", 6, "--policy", "topk(2)")
    assert done.exit_code == 0, done.output
    assert "(100%)" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "4", "--mask-token", "64"], "none of the model's 64 tokens"),
        ([], "--block-size"),
        (["--block-size", "0"], "block size 0"),
        (["--block-size", "4", "--threshold", "2"], "threshold 2.0"),
        (["--block-size", "4", "--steps", "9"], "9 steps for blocks of 4"),
        (["--block-size", "4", "--max-new", "0"], "0 new tokens"),
        (["--block-size", "4", "--max-new", "900"], "the model has 128"),
        (["--block-size", "4", "--policy", "nonsense"], "unknown policy"),
        (["--block-size", "4", "--group", "planet"], "unknown grouping"),
        (["--block-size", "4", "--prompt", "5 63 6"], "holds the mask token"),
    ],
)
def test_bad_input_of_diffuse_is_one_sentence(texts: list[Path], arguments: list[str], message: str) -> None:
    done = invoke("diffuse", "--prompt", "5 6", *arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no policy was given"),
        (["-p", "topk(1)", "--prefill", "6"], "do not split into blocks of 4"),
        (["-p", "topk(1)", "--prefill", "16"], "leaves nothing to decode"),
        (["-p", "topk(1)", "--interference"], "--interference"),
        (["-p", "topk(1)", "--check-lockstep"], "--check-lockstep"),
        (["-p", "topk(2)"], "changed no row"),
        (["-p", "topk(1)", "--batches", "500"], "separate sequences"),
        (["-p", "topk(1)", "--group", "block:2"], "use request or batch"),
    ],
)
def test_bad_input_of_evaluate_is_one_sentence(texts: list[Path], arguments: list[str], message: str) -> None:
    done = invoke("evaluate", "--decode", "block-diffusion", *SMALL, *arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_options_of_block_diffusion_need_it(texts: list[Path]) -> None:
    done = invoke("evaluate", "-p", "topk(1)", "--block-size", "4")
    assert done.exit_code == 2
    assert "--decode block-diffusion" in done.output.replace("\n", " ")
    done = invoke("evaluate", "-p", "topk(1)", "--decode", "guessing")
    assert done.exit_code == 2
    assert "lockstep or block-diffusion" in done.output.replace("\n", " ")


def test_a_missing_mask_token_names_its_option(texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffuse, "load", lambda *given: (small_model(), Numbers(), None))
    done = invoke("diffuse", "--block-size", "4")
    assert done.exit_code == 2
    assert "--mask-token" in done.output.replace("\n", " ")


def test_a_judge_with_too_few_tokens() -> None:
    from tiny_models import tiny_model

    few, many = tiny_model("qwen3_moe", vocab_size=62), small_model()
    with pytest.raises(CarpoolError, match="--judge has 62 tokens"):
        block_diffusion.require_same_tokens(few, many, 63)
    block_diffusion.require_same_tokens(tiny_model("qwen3_moe", vocab_size=63), many, 63)
    with pytest.raises(CarpoolError, match="--judge has 63 tokens"):
        block_diffusion.require_same_tokens(tiny_model("qwen3_moe", vocab_size=63), many, 5)


# the view


def test_a_picture_is_as_high_as_what_was_accepted_and_never_long() -> None:
    assert picture([0, 1, 4, 8], 8) == " ▁▄█"
    assert picture([1] * 7, 1) == "█" * 7
    assert picture([1] * 63 + [8], 8) == "▁" * 31 + "█", "two forwards a bar, as high as the higher one"
    assert all(len(picture([1] * count, 3)) <= 32 for count in range(1, 200))
    assert picture([], 1) == ""


def test_a_film_of_a_run() -> None:
    model = small_model()
    prompts = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([5, 6])]
    film = Film(prompts, 7)
    decoding = Decoding(4, MASK, threshold=0.3, max_new=7)
    made = generate(Session(model, prompts, 4), prompts, decoding, watch=film.take)
    assert film.frames[0] == [[None] * 3, [None] * 2]
    assert film.forwards[0] == 0
    assert film.forwards[-1] == len(made.forwards)
    assert len(film.frames) == len(made.forwards) + made.commits + 1
    for before, after in zip(film.frames, film.frames[1:], strict=False):
        for old, new in zip(before, after, strict=True):
            assert all(a in (None, b) for a, b in zip(old, new, strict=False)), "an accepted token stays"
    assert film.frames[-1] == [tokens.tolist() for tokens in made.tokens]
    film.end(made)
    assert film.frames[-1] == [tokens.tolist() for tokens in made.tokens]


def test_text_of_a_frame() -> None:
    shown = text_of([1, None, 2, 3], Numbers().decode, [1, 5, None, 4])
    assert shown.plain == f"1 {MASKED}2 3 "
    marked = [shown.plain[span.start : span.end] for span in shown.spans if "underline" in str(span.style)]
    assert marked == ["3 "]


def test_two_runs_side_by_side() -> None:
    console = Console(width=100, record=True, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(view(("stock", "topk(k=1)"), ["5 6 "], [[[7, None]], None], [3, 0], Numbers().decode))
    shown = console.export_text()
    assert "stock: 3 forwards" in shown
    assert "topk(k=1): waits" in shown
    assert f"5 6 7 {MASKED}" in shown
    console.print(view(("stock", "topk(k=1)"), ["5 "], [[[7]], [[8]]], [1, 1], Numbers().decode))
    styled = console.export_text(styles=True)
    assert "\x1b[2m5 \x1b[0m7 " in styled, "the prompt alone is dim"
    assert "\x1b[1;4m8 \x1b[0m" in styled
