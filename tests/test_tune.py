"""`carpool tune`: the target is kept on unseen text, nothing cheaper on the grid keeps it, and progress survives."""

import json

import pytest
from lockstep_tools import NumberTokenizer, noise, opening, small_model
from typer.testing import CliRunner

from carpool.cli import tune as tune_command
from carpool.cli.commands import app
from carpool.errors import CarpoolError
from carpool.evaluate import loop
from carpool.evaluate.layout import Layout
from carpool.evaluate.study import describe
from carpool.hosts.transformers import find_layers, share
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Grouping
from carpool.tune import DEFAULT, Target, Trials, family, measurable
from carpool.tune import search as search_module
from carpool.tune import trials as trials_module

MODEL = small_model()
LAYOUT = Layout(4, 9, 3, Grouping.parse("batch"))
SMALL = ["--batch", "4", "--tokens", "96", "--sequence", "9", "--prefill", "3", "-p", "xshare"]


def trials(seed, **given):
    from carpool.evaluate.sequences import draw

    sequences = draw([noise("a", 400, seed)], NumberTokenizer(), count=16, length=9, seed=seed)
    return Trials(MODEL, describe(MODEL), sequences, LAYOUT, 4, **given)


@pytest.fixture
def command(tmp_path, monkeypatch):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for seed, path in enumerate(paths):
        documents = [noise(path.stem, 40, 100 * seed + place) for place in range(14)]
        path.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in documents))
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(MODEL, NumberTokenizer()))
    monkeypatch.setattr(tune_command, "embedded_texts", lambda: paths)
    monkeypatch.setattr(tune_command, "shipped_statistics", lambda: None)

    def run(*arguments):
        out = tmp_path / "policy.json"
        return CliRunner().invoke(app, ["tune", *SMALL, *map(str, arguments), "-o", str(out)]), out

    return run


def test_bisection_finds_what_a_full_scan_finds():
    chosen = family("xshare")
    for target in (Target(max_kl=0.2), Target(max_perplexity_ratio=1.02), Target(bytes=0.6)):
        search = trials(0)
        _, value = search_module.edge([chosen], target, search)
        scanned = [search.measure([PolicyFile(chosen.at(value))])[0] for value in range(1, 9)]
        good = [one for one in scanned if target.met(one.kl, one.perplexity_ratio, one.share)]
        assert search.measure([PolicyFile(chosen.at(value))]) == [good[0 if target.bounds_quality else -1]], target


def test_families_that_cannot_win_are_left_early():
    """The winner is that of a full scan of all families, and the losers were not searched to their ends."""
    names = ("xshare(budget=1, utility='squared')", "des_vote", "lynx", "xshare", "topk", "random")
    families = [family(one) for one in names]
    left = 0
    for target in (Target(max_kl=0.4), Target(bytes=0.7)):
        search, scan = trials(0), trials(0)
        winner, value = search_module.edge(families, target, search)
        edges = []
        for one in families:
            points = scan.measure([PolicyFile(one.at(value)) for value in one.values(8, 2)])
            good = [point for point in points if target.met(point.kl, point.perplexity_ratio, point.share)]
            edges += good[:1] if target.bounds_quality else good[-1:]
        costs = [point.share if target.bounds_quality else point.kl for point in edges]
        (best,) = search.measure([PolicyFile(winner.at(value))])
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
    kept = [search.measure([PolicyFile(chosen.at(value))])[0] for value in (3, 4)]
    assert sorted(seen) == ["topk(k=2)", "xshare(budget=3)", "xshare(budget=4)"]
    monkeypatch.setattr(trials_module, "KEPT", 0)
    anew = trials(0)
    assert [anew.measure([PolicyFile(chosen.at(value))])[0] for value in (3, 4)] == kept
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


def test_progress_is_taken_up(command, monkeypatch):
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
    assert len(json.loads(memory.read_text())["points"]) == 2
    monkeypatch.setattr(Trials, "_run", real)
    done, out = command("--max-kl", 0.2)
    assert "resuming after 2 trials" in done.output
    assert done.exit_code == 0

    # another model with the same routers begins anew, and so do other settings
    def other_experts():
        for layer in find_layers(MODEL):
            layer.experts.down_proj.data.neg_()

    monkeypatch.setattr(Trials, "_run", dying)
    count = 0
    command("--max-kl", 0.2)
    kept = memory.read_text()
    monkeypatch.setattr(Trials, "_run", real)
    other_experts()
    assert "resuming" not in command("--max-kl", 0.2)[0].output
    other_experts()
    memory.write_text(kept)
    assert "resuming after 2 trials" in command("--max-kl", 0.2)[0].output
    memory.write_text(json.dumps({"settings": {"seed": 7}, "points": []}))
    assert "resuming" not in command("--max-kl", 0.2)[0].output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one target"),
        (["--max-kl", "0.1", "--bytes", "0.5"], "give one target"),
        (["--max-kl", "0"], "--max-kl 0.0: give a number above 0"),
        (["--bytes", "1.5"], "--bytes 1.5: give a number between 0 and 1"),
        (["--max-perplexity-ratio", "0.9"], "give a number above 1"),
        (["--max-kl", "0.1", "--tokens", "90000"], "add text, or lower --sequence, --tokens or --batch"),
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


def test_families_without_their_statistics_are_left_out():
    families = [family(one) for one in DEFAULT]
    assert families[0].plan.policy.name == "surrogate"
    names = {one.plan.policy.name for one in measurable(families, {"coverage"})}
    assert names == {"xshare", "des_vote", "lynx"}
    assert measurable(families, [name for one in families for name in one.required_stats]) == families
