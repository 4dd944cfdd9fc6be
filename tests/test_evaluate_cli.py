"""`carpool evaluate` and `carpool demo` from the command line, on a tiny model."""

import json

import pytest
from lockstep_tools import NumberTokenizer, opening, small_model, write_texts
from tiny_models import tiny_config
from typer.testing import CliRunner

from carpool.cli import demo as demo_command
from carpool.cli import evaluate as evaluate_command
from carpool.cli.commands import app
from carpool.evaluate import series
from carpool.evaluate.intervals import FEWEST
from carpool.plans.grammar import parse
from carpool.plans.policy_file import PolicyFile

NUMBERS = {"batch": 4, "group": "batch", "sequence": 9, "prefill": 3, "batches": 2, "seed": 0}
SMALL = ["--batch", "2,4", "--batches", "2", "--sequence", "9", "--prefill", "3"]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    paths = write_texts(tmp_path)
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(small_model(), NumberTokenizer()))
    monkeypatch.setattr("carpool.artefacts.model_source.configuration", lambda model: {})
    for module in (evaluate_command, demo_command):
        monkeypatch.setattr(module, "embedded_texts", lambda: paths)
    return paths


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_evaluate_writes_everything(texts, tmp_path):
    out = tmp_path / "out.json"
    done = invoke("evaluate", "-p", "oea(k0=1)", "-p", "topk(1)", *SMALL, "--json", out)
    assert done.exit_code == 0, done.output
    assert "oea(k0=1)" in done.output
    content = json.loads(out.read_text())
    assert [(row["policy"], row["batch"]) for row in content["results"]] == [
        (policy, batch) for batch in (2, 4) for policy in ("stock", "oea(k0=1)", "topk(k=1)")
    ]
    assert set(content["versions"]) == {"carpool", "torch", "transformers", "python"}
    assert {"commit", "seed", "arguments", "texts"} <= set(content)
    assert len(content["model"]["fingerprint"]) == 64
    assert all(len(text["sha256"]) == 64 for text in content["texts"])
    oea = content["results"][1]
    assert oea["changed_rows"] > 0
    assert len(oea["union_by_layer"]) == 2
    assert oea["kl"]["low"] is None  # two batches say nothing about their spread
    assert done.output.count("do not show how sure these numbers are") == 2  # at either batch size
    details = oea["details"]
    assert set(details["expert_use"]) == {"code", "prose"}
    assert sum(details["displaced_histogram"]) == oea["decoded_tokens"] * 2
    assert details["worst_rows"][0]["text"].split()


def test_caps_per_device_suppose_experts_in_order(texts, tmp_path):
    out = tmp_path / "out.json"
    capped, bare = (str(parse(text)) for text in ("xshare_expert_parallel(1, warmup=0)", "xshare(2, warmup=0)"))
    done = invoke("evaluate", "-p", capped, "-p", bare, "--devices", 2, *SMALL, "--json", out)
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    assert content["arguments"]["devices"] == 2
    rows = {(row["policy"], row["batch"]): row for row in content["results"]}
    assert rows[capped, 4]["union"]["value"] == rows[bare, 4]["union"]["value"] == 2  # one expert of either device
    assert rows[capped, 4]["kl"] != rows[bare, 4]["kl"]  # not the same two everywhere
    for arguments, said in (
        (("--devices", 3), "8 experts do not divide evenly"), ((), "needs the device of each expert"),
        (("--devices", 0), "do not divide evenly"),
    ):  # fmt: skip
        done = invoke("evaluate", "-p", capped, *arguments, *SMALL)
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_ten_batches_have_intervals(texts, tmp_path):
    out = tmp_path / "out.json"
    done = invoke("evaluate", "-p", "oea(k0=1)", "--batch", "2", "--batches", "10", *SMALL[4:], "--json", out)
    assert done.exit_code == 0, done.output
    assert "do not show how sure" not in done.output
    kl = json.loads(out.read_text())["results"][1]["kl"]
    assert kl["low"] < kl["value"] < kl["high"]


def test_a_domain_without_a_sequence_is_left_out(texts, tmp_path):
    """One sequence at batch 1, of one of two domains."""
    out = tmp_path / "out.json"
    done = invoke("evaluate", "-p", "topk(1)", "--batch", "1,4", "--batches", "1", *SMALL[4:], "--json", out)
    assert done.exit_code == 0, done.output
    seen = [len(row["domains"]) for row in json.loads(out.read_text())["results"]]
    assert seen == [1, 1, 2, 2]


@pytest.fixture
def policy_file(tmp_path):
    """Layer 1 keeps its native routing, layer 0 does not."""
    path = tmp_path / "mine.json"
    PolicyFile(parse("oea(k0=1)"), layers={1: {"k0": 2}}).save(path)
    return path


def test_evaluate_takes_policy_files(texts, tmp_path, policy_file):
    out = tmp_path / "out.json"
    done = invoke("evaluate", "-p", policy_file, "-p", "oea(k0=1)", "-p", policy_file, *SMALL, "--json", out)
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    stock, mine, plain = content["results"][:3]
    assert (mine["policy"], plain["policy"]) == ("mine.json: oea(k0=1)", "oea(k0=1)")
    assert mine["union_by_layer"][0] == plain["union_by_layer"][0] < stock["union_by_layer"][0]
    assert mine["union_by_layer"][1] > plain["union_by_layer"][1]
    assert [one["name"] for one in content["arguments"]["policy_files"]] == ["mine.json"]
    shown = invoke("report", out, "-o", tmp_path / "report.html")
    assert shown.exit_code == 0, shown.output


def test_interference_and_the_check_take_policy_files(texts, tmp_path, policy_file):
    out = tmp_path / "out.json"
    few = ["--batch", "2", *SMALL[2:]]
    done = invoke("evaluate", "-p", policy_file, *few, "--interference", "--co-batches", "2", "--json", out)
    assert done.exit_code == 0, done.output
    assert [row["policy"] for row in json.loads(out.read_text())["results"]] == ["stock", "mine.json: oea(k0=1)"]
    done = invoke("evaluate", "-p", policy_file, *few, "--check-lockstep")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "fewer"),
    [
        (["evaluate", "-p", "oea(k0=1)", "--batch", "5000"], "lower --sequence, --batch or --tokens"),
        (["evaluate", "-p", "oea(k0=1)", "--batches", "5000"], "lower --sequence, --batch or --batches"),
        (["demo", "--batches", "5000"], "lower --batches"),
    ],
)
def test_too_little_text_is_found_before_the_weights_are_read(texts, monkeypatch, arguments, fewer):
    bare = opening(small_model(), NumberTokenizer(), without_weights=True)
    monkeypatch.setattr("carpool.hosts.transformers.open_model", bare)
    made = [series.Series("OEA", (series.parse("oea(k0=1)"),), False)]
    monkeypatch.setattr(series, "load_demo", lambda: (NUMBERS, made))
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert f"are needed: add text, or {fewer}\n" in done.output


def test_check_lockstep(texts):
    done = invoke("evaluate", "-p", "oea(k0=1)", "--batch", "2", *SMALL[2:], "--check-lockstep")
    assert done.exit_code == 0, done.output
    assert "float64" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no policy was given"),
        (["-p", "nonsense(3)"], "unknown policy or guard 'nonsense'"),
        (["-p", "xshare(budget=100)"], "asks for 100 of 8 experts"),
        (["-p", "sere(top=1)"], "needs the statistic"),
        (["-p", "oea(k0=1)", "--batch", "x"], "give batch sizes"),
        (["-p", "oea(k0=1)", "--batch", "4,4"], "each once"),
        (["-p", "oea(k0=1)", "--batch", "5000"], "separate sequences"),
        (["-p", "oea(k0=1)", "--sequence", "2"], "nothing to decode"),
        (["-p", "oea(k0=1)", "--group", "planet"], "unknown grouping"),
        (["-p", "missing.json"], "missing.json"),
        (["-p", "oea(k0=1)", "--text", "missing.jsonl"], "cannot read missing.jsonl"),
        (["-p", "oea(k0=1)", "--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(texts, arguments, message):
    done = invoke("evaluate", *SMALL, *arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_an_impossible_budget_is_found_before_the_weights_are_read(tmp_path):
    paths = write_texts(tmp_path)
    tiny_config("qwen3_moe", architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path)  # and nothing else
    done = invoke("evaluate", tmp_path, "-p", "xshare(budget=100)", "--text", paths[0], *SMALL)
    assert done.exit_code == 2
    assert "asks for 100 of 8 experts" in done.output.replace("\n", " ")


def test_text_that_the_statistics_were_made_from_is_warned_of(texts, tmp_path):
    made = tmp_path / "made.safetensors"
    done = invoke("calibrate", "--text", texts[0], "--tokens", "256", "--sequence", "16", "-o", made)
    assert done.exit_code == 0, done.output
    found = invoke("evaluate", "-p", "sere(top=1)", "-p", "topk(1)", "--stats", made, *SMALL)
    assert found.exit_code == 0, found.output
    assert f"the statistics were made from {texts[0].name}, too" in found.output
    other = invoke("evaluate", "-p", "sere(top=1)", "--stats", made, "--text", texts[1], *SMALL)
    unused = invoke("evaluate", "-p", "topk(1)", "--stats", made, *SMALL)
    assert "made from" not in other.output + unused.output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["calibrate"], "what is written there is a .safetensors file; name it so"),
        (["compress"], "name a file .safetensors, or a folder"),
        (["tune", "--max-kl", "0.1"], "what is written there is a .json file; name it so"),
    ],
)
def test_a_file_is_named_for_what_it_holds(texts, tmp_path, command, said):
    done = invoke(*command, "-o", tmp_path / "out.txt")
    assert done.exit_code == 2
    assert f"out.txt: {said}" in done.output
    assert not (tmp_path / "out.txt").exists()


def test_a_folder_in_place_of_a_policy_is_named(texts, tmp_path):
    done = invoke("evaluate", "-p", tmp_path, *SMALL)
    assert done.exit_code == 2
    assert f"{tmp_path} is a folder; name the policy file in it" in done.output


def test_demo(texts, tmp_path, monkeypatch):
    rows = [("OEA", "oea(k0=1)", False), ("SERE", "sere(top=1)", False), ("random", "random(budget=3)", True)]
    made = [series.Series(label, (series.parse(text),), control) for label, text, control in rows]
    monkeypatch.setattr(series, "load_demo", lambda: (NUMBERS, made))
    done = invoke("demo", "-o", tmp_path, "--batches", "10")
    assert done.exit_code == 0, done.output
    assert "SERE is left out" in done.output
    assert (tmp_path / "carpool-demo.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "carpool-demo.json").read_text())
    assert len(content["findings"]) == 3
    assert content["results"][1]["kl"]["low"] is not None
    # with fewer batches there is neither an interval nor a verdict
    done = invoke("demo", "-o", tmp_path, "--batches", "9")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "carpool-demo.json").read_text())
    (said,) = content["findings"]
    assert said.startswith("Too few batches (9) to say which method is better")
    assert said.endswith("Decode 10 or more (--batches 10).")
    assert content["results"][1]["kl"]["low"] is None


def test_demo_checks_its_number_first(monkeypatch):
    monkeypatch.setattr(demo_command, "embedded_texts", lambda: pytest.fail("texts were looked for"))
    done = invoke("demo", "--batches", "0")
    assert done.exit_code == 2
    assert "--batches 0: give 1 or more" in done.output


def test_demo_settings_are_valid():
    numbers, rows = series.load_demo()
    assert {"batch", "group", "sequence", "prefill", "batches", "seed"} == set(numbers)
    assert numbers["batches"] >= FEWEST
    assert all(len(row.plans) == 3 for row in rows)
    for row in rows:
        for plan in row.plans:
            plan.check(64, 8)
