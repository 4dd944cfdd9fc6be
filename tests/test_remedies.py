"""Every command that a message names works as it is pasted: it exists, takes its options, and runs on a tiny model."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from lockstep_tools import opening
from test_calibrate_command import Words
from tiny_models import tiny_model
from typer.testing import CliRunner

import carpool
from carpool.artefacts.statistics import Statistics, made_by
from carpool.artefacts.tensor_checks import AGAIN
from carpool.cli.catalogue import policy_cards
from carpool.cli.commands import app

NAMED = re.compile(
    r"`(carpool [a-z][^`]*)`|(?:^|[ :])(carpool (?:policies|evaluate|calibrate|tune|report|doctor) [^`\n]+)$"
)
SMALL = ["--batch", "2", "--batches", "1", "--sequence", "9", "--prefill", "3", "--allow-unchanged"]


class Lengths(Words):
    """Words by their length, for every command."""

    def __call__(self, text: str, add_special_tokens: bool = True, **settings: Any) -> dict[str, list[int]]:
        return dict(super().__call__(text, add_special_tokens))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def commands_in_messages() -> dict[str, str]:
    """Commands in texts that users see (not docstrings), with what is filled in as `...`; and where each stands."""
    found: dict[str, str] = {}
    for file in sorted(Path(carpool.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text())
        docs = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
                and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(one.value) if isinstance(one, ast.Constant) else "..." for one in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inside:
                text = node.value
            else:
                continue
            found |= {next(filter(None, match)): file.name for match in NAMED.findall(text)}
    return found


def parameters(command: str, rest: list[str]) -> set[str]:
    """Options of a command; `trace` without the name of one of its commands records."""
    known: Any = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    if hasattr(known, "commands"):
        known = known.commands[next((word for word in rest if word in known.commands), "record")]
    return {name for one in known.params for name in one.opts}


def test_the_search_finds_what_is_there() -> None:
    found = commands_in_messages()
    assert "carpool calibrate MODEL -o stats.safetensors" in found
    assert "carpool evaluate --json" in found
    assert "carpool evaluate --policy '...'..." in found
    assert len(found) > 8


@pytest.mark.parametrize(
    "text", [*commands_in_messages(), *map(made_by, ("norm_scale", "sensitivity", "surrogate_in"))]
)
def test_a_named_command_exists_with_these_options(text: str) -> None:
    _, name, *rest = shlex.split(text)
    options = {word for word in rest if word.startswith("-")}
    assert name in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert options <= parameters(name, rest) | {"--help"}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The commands on a model of 16 experts, 8 a token; `MODEL` is that, and the text is words of a length."""
    model = tiny_model(
        "qwen3_moe",
        num_experts=16,
        num_experts_per_tok=8,
        max_position_embeddings=512,
        hidden_size=64,
        moe_intermediate_size=64,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(model, Lengths()))
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL/config.json").write_text("{}")
    paths = []
    for domain in ("mine", "yours"):
        paths.append(tmp_path / f"{domain}.jsonl")
        lines = (" ".join("x" * (place * number % 50) for place in range(60)) for number in range(3, 43))
        paths[-1].write_text("\n".join(json.dumps({"text": line}) for line in lines))
    for module in ("common", "evaluate", "tune", "policy_files"):  # calibrations ask `common`
        monkeypatch.setattr(f"carpool.cli.{module}.embedded_texts", lambda: paths)

    def run(text: str, *more: str) -> str:
        start, *arguments = shlex.split(text)
        assert start == "carpool"
        done = CliRunner().invoke(app, [*arguments, *more])
        assert done.exit_code == 0, f"{text}: {done.output}"
        return done.output

    return run


def test_calibrations_that_messages_name_run(tiny: Any) -> None:
    """As they are: without --text, and with the tokens that the text holds."""
    for text in (AGAIN.split("`")[1], *map(made_by, ("norm_scale", "sensitivity", "surrogate_in", "easy_ep/mine"))):
        tiny(text)
        assert Path("stats.safetensors").exists()
    assert "easy_ep/mine" in Statistics.load("stats.safetensors").for_layer(0)


def test_examples_of_policies_run(tiny: Any) -> None:
    ran, made = 0, ""
    for name in policy_cards():
        shown = tiny(f"carpool policies {name}")
        for needed in re.findall(r"^Statistics from: (.*)$", shown, re.M):
            made = made if made == needed else tiny(needed) and needed
        example = shown.rpartition("Example: ")[2].strip()
        if example.startswith("carpool "):
            ran += 1
            assert name in tiny(example, *SMALL)
    assert ran == len(policy_cards()) - 2, "two policies need what `evaluate` does not have"


def test_what_an_error_names_mends_it(tiny: Any) -> None:
    """Refused for want of statistics; calibrated as the sentence says; then it runs."""
    for plan in ("base(budget=4)", "surrogate(budget=4)", "layer_threshold(tau=0.01)", "sere(top=1)"):
        done = CliRunner().invoke(app, ["evaluate", "-p", plan, *SMALL])
        assert done.exit_code == 2
        (command,) = re.findall(r"`(carpool [^`]*)`", " ".join(done.output.split()))
        tiny(command)
        assert plan in tiny(f"carpool evaluate -p '{plan}' --stats stats.safetensors", *SMALL)
