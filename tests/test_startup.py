"""What starts without torch: `--help`, `--version`, `policies`; what they say is what the code holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import carpool
from carpool.cli.catalogue import card_of, guard_cards, policy_cards
from carpool.cli.commands import app
from carpool.plans.grammar import parse
from carpool.plans.guards import GUARDS
from carpool.policies import policies

QWEN3 = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
DOCTOR = ["doctor", "qwen3.json"]
HEAVY = ("torch", "transformers", "vllm", "numpy", "lm_eval", "safetensors")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["policies"], ["policies", "--json"], ["evaluate", "--help"], DOCTOR],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_nothing_heavy_is_imported(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qwen3.json").write_text(json.dumps(QWEN3))
    code = (
        "import sys\nfrom carpool.cli import main\nsys.argv = ['carpool', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\nsys.exit(' '.join(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.parametrize("name", ["evaluate", "calibrate", "compress", "tune", "threshold"])
def test_a_model_that_is_not_there_is_refused_before_anything_heavy_is_imported(name: str) -> None:
    code = (
        "import sys\nfrom carpool.cli import main\nsys.argv = ['carpool', *sys.argv[1:]]\n"
        f"try:\n    main()\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, "/no/such/model"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert f"carpool {name}: there is no folder '/no/such/model'; give" in done.stderr


def test_the_version() -> None:
    assert invoke("--version") == f"carpool {carpool.__version__}\n"


def test_names_complete_and_each_is_there() -> None:
    assert set(carpool.__all__) <= set(dir(carpool))
    assert [name for name in dir(carpool) if not name.startswith("__")] == sorted(carpool.__all__)
    for name in carpool.__all__:
        assert getattr(carpool, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'attach'"):
        carpool.attach  # noqa: B018


def test_cards_say_what_the_classes_hold() -> None:
    assert policy_cards() == {name: card_of(kind) for name, kind in policies().items()}
    assert guard_cards() == {name: card_of(kind) for name, kind in GUARDS.items()}


@pytest.mark.parametrize("name", policies())
def test_every_policy_is_explained(name: str) -> None:
    """Every parameter with its meaning, and an example that can be read."""
    card = policy_cards()[name]
    assert set(card.told) == set(card.parameters)
    assert parse(card.example).policy.name == name
    shown = " ".join(invoke("policies", name).split())
    assert card.about in shown
    for said in ("Kind: ", "Cost: ", "Engines: transformers", "Example: ", "Identity: "):
        assert said in shown
    assert ("vLLM (plugin), on a checkpoint in planes" in shown) == (policies()[name].reads_depths is True)
    for parameter, meaning in card.told.items():
        assert parameter in shown
        assert meaning in shown
    needs = parse(card.example).policy.required_stats()
    assert ("Statistics from: carpool c" in shown) == bool(needs)


def test_policies_as_json() -> None:
    found = json.loads(invoke("policies", "--json"))
    assert [one["name"] for one in found["policies"]] == list(policies())
    assert [one["name"] for one in found["guards"]] == list(GUARDS)
    one = json.loads(invoke("policies", "base", "--json"))
    assert one["hidden_states"] is True
    assert one["parameters"][0]["name"] == "budget"
    assert one["made_by"].startswith("carpool calibrate")


def test_an_unknown_name_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["policies", "nope"])
    assert done.exit_code == 2
    assert "unknown policy or guard 'nope'; known names: " in done.output
