"""The text of a calibration, cut into sequences, and `carpool calibrate` on a tiny model."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from lockstep_tools import opening
from tiny_models import tiny_model
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.artefacts.identity import SAMPLES
from carpool.artefacts.statistics import Statistics, made_by
from carpool.artefacts.tensor_checks import SIMILARITIES
from carpool.artefacts.texts import Document
from carpool.calibrate import token_sequences
from carpool.cli.commands import app


class Words:
    """A tokenizer of words: the length of a word is its id."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + len(word) % 60 for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def words(count, length):
    return " ".join(["x" * length] * count)


def test_sequences_are_full_and_shared_between_domains():
    documents = [Document("a", words(2000, 4)), Document("b", words(20, 5)), Document("b", words(150, 5))]
    sequences_BT, domains, _ = token_sequences(documents, Words(), tokens=400, sequence=40, seed=0)
    assert sequences_BT.shape == (10, 40)
    assert (sequences_BT[:, 0] == 1).all()  # each begins as the model's inputs do
    assert not (sequences_BT[:, 1:] == 1).any()
    from_b = (sequences_BT == 3 + 5).any(1)
    assert int(from_b.sum()) == 4  # all that b has to give; the rest comes from a
    assert [domain == "b" for domain in domains] == from_b.tolist()
    assert torch.equal(sequences_BT, token_sequences(documents, Words(), 400, 40, seed=0).ids_BT)


def test_too_little_text_is_refused():
    with pytest.raises(CarpoolError, match="gives 2 full sequences of 40 tokens"):
        token_sequences([Document("a", words(100, 4))], Words(), tokens=400, sequence=40, seed=0)
    with pytest.raises(CarpoolError, match="100 tokens are too few"):
        token_sequences([], Words(), tokens=100, sequence=40, seed=0)
    with pytest.raises(CarpoolError, match="4 tokens is too short"):
        token_sequences([], Words(), tokens=400, sequence=4, seed=0)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `carpool calibrate` on a tiny model in a folder with a text; gives exit code and all output in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join("x" * (i * i % 50) for i in range(4000)))
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(tiny_model("qwen3_moe"), Words()))

    def call(*arguments):
        result = CliRunner().invoke(app, ["calibrate", *arguments])
        return result.exit_code, " ".join(result.output.split())

    return call


def test_command_writes_checked_statistics(command, tmp_path):
    line = json.dumps({"text": words(3000, 7), "source": "any"})
    (tmp_path / "more.jsonl").write_text(line + "\n\n")
    arguments = ("--text", "text.txt", "--text", "more.jsonl", "--tokens", "500", "--sequence", "50", "--seed", "4")
    code, output = command("some/model", *arguments, "-o", "out.safetensors")
    assert code == 0, output
    assert "over 500 tokens" in output
    assert "wrote out.safetensors" in output
    stats = Statistics.load("out.safetensors")
    assert (stats.tokens, stats.seed, stats.architecture) == (500, 4, "Qwen3MoeForCausalLM")
    assert [name for name, _ in stats.data] == ["text.txt", "more.jsonl"]
    assert set(stats.layers) == {0, 1}
    assert set(stats.layers[0]) == {*SIMILARITIES, *SAMPLES, "coverage"}
    few = [e for layer in stats.layers.values() for e in layer["coverage"].tolist() if e < 32]
    assert ("warning:" in output) == bool(few)


def test_command_names_experts_without_tokens(command):
    code, output = command("--text", "same.txt", "--tokens", "256", "--sequence", "64")
    assert code == 2
    assert "cannot read same.txt" in output
    Path("same.txt").write_text(words(3000, 7))  # one word again and again reaches few experts
    code, output = command("--text", "same.txt", "--tokens", "256", "--sequence", "64")
    assert code == 0
    stats = Statistics.load("stats.safetensors")
    unseen = [f"{i}:{e}" for i, t in stats.layers.items() for e, n in enumerate(t["coverage"].tolist()) if n == 0]
    assert unseen
    assert "no token reached these experts (layer:expert), so nothing is known of their use: " in output
    assert ", ".join(unseen[:12]) in output


def test_command_scores_domains_and_layers(command, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": words(3000, 7)}))
    arguments = ("--text", "text.txt", "--text", "more.jsonl", "--tokens", "512", "--sequence", "64")
    code, output = command(*arguments, "--energy", "--sensitivity")
    assert code == 0, output
    assert "scores of their own, for `carpool allow-list --domain`: 'text' (256 tokens), 'more' (256 tokens)" in output
    tensors = Statistics.load("stats.safetensors").layers
    for layer in tensors.values():
        assert int(layer["coverage/text"].sum()) == int(layer["coverage/more"].sum()) == 256 * 2
        assert torch.equal(layer["coverage/text"] + layer["coverage/more"], layer["coverage"])
        for name in ("easy_ep", "easy_ep/text", "easy_ep/more"):
            assert layer[name].sum().item() == pytest.approx(1, abs=1e-5)
        assert not torch.allclose(layer["easy_ep/text"], layer["easy_ep/more"])
    assert sum(layer["sensitivity"].item() for layer in tensors.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "name", ["similarity_routed", "norm_scale", "ratio_quantiles", "easy_ep", "easy_ep/text", "coverage/text",
             "sensitivity", "surrogate_unexplained"],
)  # fmt: skip
def test_the_command_that_an_error_names_works(command, tmp_path, name):
    for file in ("text.jsonl", "mine.jsonl"):
        (tmp_path / file).write_text("\n".join(json.dumps({"text": words(300, n)}) for n in range(3, 23)))
    given = {"MODEL": "some/model", "FILE": "mine.jsonl"}
    start, verb, *arguments = (given.get(word, word) for word in shlex.split(made_by(name)))
    assert (start, verb) == ("carpool", "calibrate")
    code, output = command(*arguments, "--tokens", "2048", "--sequence", "64")
    assert code == 0, output
    assert name in Statistics.load("stats.safetensors").for_layer(0)


def test_command_says_what_its_tokens_cannot_show(command, tmp_path, monkeypatch):
    """Experts that got no surrogate, and a predictor with hardly more tokens than coefficients."""
    lines = [json.dumps({"text": " ".join("x" * ((i * n) % 50) for i in range(300))}) for n in range(3, 13)]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    few = ("--text", "more.jsonl", "--sequence", "16", "--surrogates", "2", "--energy")
    code, output = command(*few, "--tokens", "320")
    assert code == 0, output
    held = 4 * 16
    assert f"of the experts' output energy on {held} tokens of other documents" in output
    layers = Statistics.load("stats.safetensors").layers
    none = [f"{i}:{e}" for i, t in layers.items() for e, share in enumerate(t["surrogate_unexplained"]) if share == 1]
    assert none
    assert f"got no surrogate, for lack of tokens to fit or to measure it: {', '.join(none[:12])}" in output
    assert "coefficients an expert" not in output
    monkeypatch.setattr("carpool.cli.calibrate.PREDICTED", 10)
    code, output = command(*few, "--tokens", "320")
    assert "has 33 coefficients an expert and saw 320 tokens" in output
    assert "raise --tokens to 330" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "text.txt", "-o", "none/out.safetensors"), "does not exist"),
        (("--text", "text.txt", "-o", "."), "not a regular file"),
        (("--text", "text.txt", "--tokens", "10"), "--tokens 10: give 256 or more"),
        (("--text", "text.txt", "--sequence", "4"), "--sequence 4: give 8 or more"),
        (("--text", "text.txt", "--seed", "-1"), "--seed -1: give 0 to"),
        (("--text", "text.txt", "--surrogates", "-1"), "--surrogates -1: give 0 or more"),
        (("--text", "text.txt", "--sequence", "200", "--tokens", "400"), "exceed the model's 128"),
    ],
)
def test_command_refuses_in_one_sentence(command, tmp_path, arguments, message):
    code, output = command(*arguments)
    assert code == 2
    assert message in output
    assert output.startswith("carpool calibrate: ")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_interrupted_command_leaves_the_old_file(command, tmp_path, monkeypatch):
    (tmp_path / "stats.safetensors").write_text("old")

    def interrupted(tensors, path, metadata):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    code, _ = command("--text", "text.txt", "--tokens", "256", "--sequence", "64")
    assert code != 0
    assert (tmp_path / "stats.safetensors").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "stats.safetensors"}
