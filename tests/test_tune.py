"""`carpool tune`: the target is kept on unseen text, nothing cheaper on the grid keeps it, and progress survives."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lockstep_tools import NumberTokenizer, noise, opening, small_model
from rich.console import Console
from typer.testing import CliRunner

from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import load_texts
from carpool.cli import tune as tune_command
from carpool.cli import tune_view
from carpool.cli.commands import app
from carpool.errors import CarpoolError
from carpool.evaluate import loop
from carpool.evaluate.layout import Layout
from carpool.evaluate.sequences import Cut, draw
from carpool.evaluate.study import Settings, describe, study
from carpool.hosts.engine.settings import Settings as Served
from carpool.hosts.transformers import find_layers, share
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Grouping
from carpool.tune import DEFAULT, Failed, Point, Target, Trials, Tuned, bounded, family, measurable, tune
from carpool.tune import search as search_module
from carpool.tune import trials as trials_module
from carpool.tune.split import split

MODEL = small_model()
LAYOUT = Layout(4, 9, 3, Grouping.parse("batch"))
SMALL = ["--batch", "4", "--tokens", "240", "--sequence", "9", "--prefill", "3", "-p", "xshare", "--also-batch", ""]


def sequences(seed, batches=10):
    documents = [noise("a", 60, 100 * seed + number) for number in range(batches)]
    return draw(documents, NumberTokenizer(), count=4 * batches, length=9, seed=seed, batches=batches)


def trials(seed, **given):
    return Trials(MODEL, describe(MODEL), sequences(seed), LAYOUT, **given)


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


def test_points_are_what_an_evaluation_measures():
    """Interval, perplexity ratio (above 1 where text is predicted worse) and bytes."""
    plans = [family("xshare").at(3), family("topk").at(1), family("xshare").at(6)]
    settings = Settings(tuple(plans), LAYOUT.grouping, (4,), sequence=9, prefill=3, batches=10)
    ((_, *found),) = study(MODEL, settings, [sequences(0)])
    points = trials(0).measure(plans)
    for point, one in zip(points, found, strict=True):
        assert (point.kl, point.kl_low, point.kl_high) == pytest.approx((one.kl.value, one.kl.low, one.kl.high))
        assert point.kl_low < point.kl < point.kl_high
        assert point.perplexity_ratio == pytest.approx(one.perplexity_ratio.value)
        assert point.share == pytest.approx(one.bytes_share.value)
    assert max(point.perplexity_ratio for point in points) > 1.001


def test_few_batches_are_no_evidence():
    with pytest.raises(CarpoolError, match=r"9 batches do not show how sure .* on 10 or more \(--tokens\)"):
        Trials(MODEL, describe(MODEL), sequences(0, batches=9), LAYOUT)


def test_bisection_finds_what_a_full_scan_finds():
    chosen = family("xshare")
    for target in (Target(max_kl=0.2), Target(max_perplexity_ratio=1.02), Target(bytes=0.7)):
        search = trials(0)
        _, value = search_module.edge([chosen], target, search)
        scanned = [search.measure([chosen.at(value)])[0] for value in range(1, 9)]
        good = [one for one in scanned if target.met(one.kl, one.perplexity_ratio, one.share)]
        assert search.measure([chosen.at(value)]) == [good[0 if target.bounds_quality else -1]], target


def test_families_that_cannot_win_are_left_early():
    """The winner is that of a full scan of all families, and the losers were not searched to their ends."""
    names = ("xshare(budget=1, utility='squared')", "des_vote", "lynx", "xshare", "topk", "random")
    families = [family(one) for one in names]
    left = 0
    for target in (Target(max_kl=0.1), Target(bytes=0.7)):
        search, scan = trials(0), trials(0)
        winner, value = search_module.edge(families, target, search)
        edges = []
        for one in families:
            points = scan.measure([one.at(value) for value in one.values(8, 2)])
            good = [point for point in points if target.met(point.kl, point.perplexity_ratio, point.share)]
            edges += good[:1] if target.bounds_quality else good[-1:]
        costs = [point.share if target.bounds_quality else point.kl for point in edges]
        (best,) = search.measure([winner.at(value)])
        assert (best.share if target.bounds_quality else best.kl) == min(costs), target
        alone = trials(0)
        for one in families:
            search_module._bisect(one, one.values(8, 2), target, alone, None)
        left += len(alone.points) - len(search.points)
    assert left >= 2


def test_stock_runs_once(monkeypatch):
    real, seen = loop.forward, []
    monkeypatch.setattr(
        loop, "forward", lambda model, plan, *given, **named: seen.append(str(plan))
        or real(model, plan, *given, **named),
    )  # fmt: skip
    search, chosen = trials(0), family("xshare")
    kept = [search.measure([chosen.at(value)])[0] for value in (3, 4)]
    assert sorted(seen) == ["topk(k=2)", "xshare(budget=3)", "xshare(budget=4)"]
    monkeypatch.setattr(trials_module, "KEPT", 0)
    anew = trials(0)
    assert [anew.measure([chosen.at(value)])[0] for value in (3, 4)] == kept
    assert seen.count("topk(k=2)") == 3


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


@pytest.mark.parametrize(("high", "met"), [(0.15, True), (0.25, True), (0.25, False)])
def test_what_is_printed_is_what_was_verified(high, met, capsys):
    target, seen = Target(max_kl=0.2), Point("xshare(budget=3)", 0.1, 0.07, high, 1.05, 0.4)
    found = Tuned(family("xshare").at(3), replace(seen, kl=0.01), seen, met)
    options, files = tune_command.Options(model="some/model", batch=4), tune_view.Files(Path("mine.json"))
    tune_command.show(Console(width=400), options, target, found, 12, files, [])
    said = capsys.readouterr().out
    assert (
        """vllm serve some/model --additional-config '{"carpool": {"file": "mine.json", "isolation": "batch"}}'"""
        in said
    )
    assert f"reads 40.0% of what stock reads, at KL 0.1000 (0.0700 to {high:.4f}, 12 batches)" in said
    assert ("its interval reaches beyond the target" in said) == (met and high > 0.2)
    assert ("misses the target" in said) == (not met)


CHEAP, KEPT = Point("xshare(budget=3)", 0.19, 0.1, 0.2, 1.04, 0.589), Point("xshare(budget=4)", 0.1, 0, 0.2, 1.0, 0.623)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(max_kl=0.2), "KL 0.2600 > 0.2"),
        (Target(max_perplexity_ratio=1.05), "perplexity x 1.0700 > 1.05"),
        (Target(bytes=0.6), "reads 61.0% > 60.0%"),
    ],
)
def test_why_cheaper_plans_failed(target, said):
    failed = Failed(CHEAP, replace(CHEAP, kl=0.26, perplexity_ratio=1.07, share=0.61))
    found = Tuned(family("xshare").at(4), KEPT, KEPT, True, (failed,))
    assert tune_view.why_not(found, target) == [
        f"xshare(budget=3) (58.9% on the searched text) failed verification: {said}"
    ]


def test_what_failed_verification_is_kept(monkeypatch):
    """The edge of the search is missed on the other text: the answer is the next value, and says why."""
    search, verify, chosen = trials(0), trials(1), family("xshare")
    (edge,) = search.measure([chosen.at(search_module.edge([chosen], Target(max_kl=0.1), search)[1])])
    real = verify.measure
    monkeypatch.setattr(
        verify,
        "measure",
        lambda plans: [replace(one, kl=0.5) if one.policy == edge.policy else one for one in real(plans)],
    )
    found = tune([chosen], Target(max_kl=0.1), search, verify)
    assert found.met
    assert [(one.searched, one.verified.kl) for one in found.failed] == [(edge, 0.5)]
    assert found.plan != edge.policy


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


def test_families():
    assert str(family("xshare | floor(0.3)").at(5)) == "xshare(budget=5) | floor(0.3)"
    assert str(family("oea").at(2)) == "oea(k0=2)"
    assert family("xshare | floor(0.3)").name == "xshare | floor(0.3)"
    assert family("xshare(budget=1, utility='squared')").name == "xshare(utility='squared')"
    assert family("oea").values(8, 2) == [1, 2]
    with pytest.raises(CarpoolError, match="no number to tune"):
        family("top_p(p=0.5)")


def test_bytes_are_searched_in_hundredths_up_to_the_deepest_depth():
    depth = family("depth | floor(0.3)")
    assert depth.values(64, 8) == [], "without statistics nobody knows how deep the experts are stored"
    stored = {"depth_bytes": torch.tensor([0.14, 0.27]), "depth_use": torch.zeros(3, 2, 64)}
    stored["depth_use"][0, :, :8] = 0.1  # a lone row uses eight experts
    (known,) = bounded([depth], stored)
    assert known.values(64, 8) == list(range(8, 28))
    (whole,) = bounded([family("depth(bytes=0.25, levels=[2, 3])")], stored)
    assert whole.values(64, 8) == list(range(15, 28)), "no expert that is read takes less"
    stored["depth_use"][0, :, 1:] = 0.0  # or one, which is read with 14 % at the least
    (lone,) = bounded([depth], stored)
    assert lone.values(64, 1) == list(range(15, 28))
    assert str(known.at(22)) == "depth(bytes=0.22) | floor(0.3)"
    assert bounded([family("xshare")], {}) == [family("xshare")]


def test_families_without_their_statistics_are_left_out():
    families = [family(one) for one in DEFAULT]
    assert [one.plan.policy.name for one in families[:2]] == ["depth", "surrogate"]
    names = {one.plan.policy.name for one in measurable(families, {"coverage"})}
    assert names == {"xshare", "des_vote", "lynx"}
    assert measurable(families, [name for one in families for name in one.required_stats]) == families
