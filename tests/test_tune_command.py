"""`carpool tune` as it is run: what it prints, writes, refuses and takes up again."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from lockstep_tools import NumberTokenizer, noise, opening, small_model
from typer.testing import CliRunner

from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import load_texts
from carpool.cli import tune as tune_command
from carpool.cli.commands import app
from carpool.evaluate.layout import Layout
from carpool.evaluate.sequences import Cut
from carpool.evaluate.study import describe
from carpool.hosts.engine.settings import Settings as Served
from carpool.hosts.transformers import find_layers, share
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Grouping
from carpool.tune import Point, Trials, family
from carpool.tune.split import split

MODEL = small_model()
LAYOUT = Layout(4, 9, 3, Grouping.parse("batch"))
SMALL = ["--batch", "4", "--tokens", "240", "--sequence", "9", "--prefill", "3", "-p", "xshare", "--also-batch", ""]


@pytest.fixture
def command(tmp_path, monkeypatch):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for seed, path in enumerate(paths):
        documents = [noise(path.stem, 60, 100 * seed + place) for place in range(14)]
        path.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in documents))
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(MODEL, NumberTokenizer()))
    monkeypatch.setattr(tune_command, "embedded_texts", lambda: paths)

    def run(*arguments, small=SMALL):
        out = tmp_path / "policy.json"
        return CliRunner().invoke(app, ["tune", *small, *map(str, arguments), "-o", str(out)]), out

    return run


def test_a_policy_file_comes_out(command):
    done, out = command("--max-kl", 0.2)
    assert done.exit_code == 0, done.output
    loaded = PolicyFile.load(out)
    assert loaded.model["num_experts"] == 8
    head = loaded.curve[0]
    assert head["target"] == {"max_kl": 0.2}
    assert (head["batch"], head["sequence"], head["prefill"]) == (4, 9, 3)
    assert [name for name, _ in head["texts"]] == ["a.jsonl", "b.jsonl"]
    unseen = [one for one in loaded.curve if one.get("text") == "unseen"][-1]
    assert unseen["kl"] <= 0.2
    assert not list(out.parent.glob("*.progress"))
    with share(MODEL, loaded) as run:
        import torch

        MODEL(torch.arange(4).view(4, 1) + 5, use_cache=False)
    assert run.report()[0].calls == 1


CHEAP, KEPT = Point("xshare(budget=3)", 0.19, 0.1, 0.2, 1.04, 0.589), Point("xshare(budget=4)", 0.1, 0, 0.2, 1.0, 0.623)


def test_other_batch_sizes_are_measured_and_kept(command):
    done, out = command("--max-kl", 0.2, "--also-batch", "2,4,64")
    assert done.exit_code == 0, done.output
    assert "at batch 2: reads" in done.output
    assert "at batch 64: not measured: the texts hold" in done.output
    (other,) = [one for one in PolicyFile.load(out).curve if one.get("text") == "unseen, at other batch sizes"]
    assert other["batch"] == 2
    assert other["kl"] > 0


def test_the_end_names_files_and_the_command(command, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_command, "WINDOW", 16)
    done, out = command("--max-kl", 0.5, "-p", "base")
    assert done.exit_code == 0, done.output
    kept = PolicyFile.load(out)
    said = done.output.splitlines()
    assert f"wrote {out}" in said
    stats = out.with_suffix(".safetensors")
    needed = kept.statistics is not None
    wanted = f"its statistics are {stats}: keep both" if needed else f"wrote {stats} ("
    assert any(line.startswith(wanted) for line in said)
    line = next(line for line in said if line.startswith("serve it: "))
    *_, model, option, config = shlex.split(line)
    assert option == "--additional-config"
    assert Served.of(json.loads(config)).policies == kept
    assert Path(model, "config.json").exists()
    assert {one.name for one in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", out.name, stats.name}


def test_json_is_all_there_is_on_standard_output(command):
    done, out = command("--max-kl", 0.2, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["policy"] == str(PolicyFile.load(out).plan)
    assert said["files"] == {"policy": str(out), "statistics": None, "spare": None}
    assert said["verified"]["kl"] <= 0.2
    assert said["serve"].startswith("vllm serve ")
    assert f"wrote {out}" in done.stderr


def test_an_infeasible_target_leaves_nothing_hidden(command, tmp_path):
    done, _ = command("--max-kl", "1e-12")
    assert done.exit_code == 2
    assert {one.name for one in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_each_half_is_measured_on_its_own(command, tmp_path):
    done, out = command("--max-kl", 0.2)
    assert done.exit_code == 0, done.output
    halves = split(load_texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    curve = PolicyFile.load(out).curve[1:]
    for half, name in ((halves.search, "search"), (halves.verify, "unseen")):
        batches = Cut.of(half, NumberTokenizer(), length=9, seed=0).draw(10, 4, seed=0)
        measured = Trials(MODEL, describe(MODEL), batches, LAYOUT)
        points = {one["policy"]: one for one in curve if one["text"] == name}
        assert points
        for value in range(1, 9):
            (point,) = measured.measure([family("xshare").at(value)])
            if point.policy in points:
                assert points[point.policy]["kl"] == pytest.approx(point.kl)


def test_a_missed_target_is_said_and_is_no_success(command, monkeypatch):
    import carpool.tune

    real = carpool.tune.tune
    monkeypatch.setattr(carpool.tune, "tune", lambda *given: replace(real(*given), met=False))
    done, out = command("--max-kl", 0.2)
    assert done.exit_code == 1
    assert "misses the target (KL of at most 0.2 nats a token)" in done.output
    assert "reaches beyond" not in done.output
    assert out.exists()


def test_without_tokens_the_text_says_how_many_batches(command):
    """As many as it holds without a document in common, at least ten."""
    done, out = command("--max-kl", 0.2, small=[*SMALL[:2], *SMALL[4:]])
    assert done.exit_code == 0, done.output
    assert PolicyFile.load(out).curve[0]["tokens"] == 24 * 14
    done, _ = command("--max-kl", 0.2, small=["--batch", "8", *SMALL[4:]])
    assert done.exit_code == 2
    assert "10 are needed: add text, or lower --sequence or --batch (half of the text" in done.output


def test_statistics_come_from_the_searched_half(command, tmp_path, monkeypatch):
    """No token of the half to verify on is calibrated on, and the file says which half it was."""
    import carpool.calibrate

    seen, real = [], carpool.calibrate.calibrate
    monkeypatch.setattr(
        carpool.calibrate, "calibrate", lambda model, layers, ids_BT, **given: seen.append(ids_BT)
        or real(model, layers, ids_BT, **given),
    )  # fmt: skip
    monkeypatch.setattr(tune_command, "WINDOW", 16)
    done, out = command("--max-kl", 5, "-p", "base")
    assert done.exit_code == 0, done.output
    halves = split(load_texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    (ids_BT,) = seen
    windows = {" ".join(map(str, row[:8])) for row in ids_BT.tolist()}
    searched, verified = ([one.text for one in half] for half in (halves.search, halves.verify))
    assert windows
    assert sum(any(window in text for text in searched) for window in windows) > len(windows) / 2
    assert not any(window in text for text in verified for window in windows)
    assert Statistics.load(out.with_suffix(".safetensors")).data[0][0] == "a.jsonl, the half that was searched"


def test_progress_is_taken_up(command, tmp_path, monkeypatch):
    real, count = Trials._run, 0

    def dying(self, candidates):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(self, candidates)

    monkeypatch.setattr(Trials, "_run", dying)
    done, out = command("--max-kl", 0.2)
    assert done.exit_code != 0
    assert not out.exists()
    memory = out.with_name(".policy.json.progress")
    kept = json.loads(memory.read_text())
    assert len(kept["points"]) == 2
    assert f"interrupted after 2 trials, which are kept in {memory}: the same command goes on from there" in done.output
    monkeypatch.setattr(Trials, "_run", real)
    done, out = command("--max-kl", 0.2)
    assert "resuming after 2 trials" in done.output
    assert done.exit_code == 0

    # another model with the same routers begins anew, and so do other settings and other text
    def other_experts():
        for layer in find_layers(MODEL):
            layer.experts.down_proj.data.neg_()

    memory.write_text(json.dumps(kept))
    other_experts()
    assert "resuming" not in command("--max-kl", 0.2)[0].output
    other_experts()
    memory.write_text(json.dumps(kept))
    assert "resuming after 2 trials" in command("--max-kl", 0.2)[0].output
    memory.write_text(json.dumps(kept))
    assert "resuming" not in command("--max-kl", 0.2, "--seed", 7)[0].output
    memory.write_text(json.dumps(kept))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(line.replace(" 5 ", " 6 ") for line in lines))
    assert "resuming" not in command("--max-kl", 0.2)[0].output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one target"),
        (["--max-kl", "0.1", "--bytes", "0.5"], "give one target"),
        (["--max-kl", "0"], "--max-kl 0.0: give a number above 0"),
        (["--bytes", "1.5"], "--bytes 1.5: give a number between 0 and 1"),
        (["--max-perplexity-ratio", "0.9"], "give a number above 1"),
        (["--max-kl", "0.1", "--tokens", "90000"], "are needed: add text, or lower --sequence, --batch or --tokens ("),
        (["--max-kl", "0.1", "--tokens", "1"], "--tokens 1 is less than 10 batches of 4"),
        (["--max-kl", "0.1", "--tokens", "239"], "give 240 or more, or lower --batch or --sequence"),
        (["--max-kl", "0.1", "--batch", "8", "--tokens", "480"], "10 are needed: add text, or lower --sequence or"),
        (["--max-kl", "0.1", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["--max-kl", "1e-12"], "no policy reaches KL of at most 1e-12"),
        (["--max-kl", "0.1", "-p", "top_p"], "top_p has no number to tune"),
        (["--max-kl", "0.1", "-p", "nonsense"], "unknown policy"),
    ],
)
def test_bad_input(command, arguments, message):
    done, out = command(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not out.exists()
