"""`carpool allow-list` and `carpool threshold` on a tiny model: what they write does what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from lockstep_tools import NumberTokenizer, opening
from tiny_models import tiny_model, tokens
from typer.testing import CliRunner

from carpool import CarpoolError, parse, share
from carpool.calibrate import calibrate
from carpool.calibrate.sensitivity import sensitivity
from carpool.calibrate.skipping import find_threshold, skipped_by
from carpool.cli.commands import app
from carpool.hosts.transformers import find_layers
from carpool.plans.policy_file import PolicyFile


class Numbers(NumberTokenizer):
    bos_token_id, eos_token_id = None, None


IDS_BT = tokens(rows=16, length=24)
MODEL = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=4)


@pytest.fixture(scope="module")
def stats():
    layers = find_layers(MODEL)
    measured = calibrate(MODEL, layers, IDS_BT, domains=["a"] * 8 + ["b.c"] * 8, energy=True)
    found = sensitivity(MODEL, layers, IDS_BT)
    return dataclasses.replace(measured, layers={i: {**t, **found[i]} for i, t in measured.layers.items()})


@pytest.fixture
def command(tmp_path, monkeypatch, stats):
    monkeypatch.chdir(tmp_path)
    stats.save("stats.safetensors")
    Path("text.txt").write_text(" ".join(str(3 + i * i % 60) for i in range(3000)))
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(MODEL, Numbers()))

    def call(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        return result.exit_code, " ".join(result.output.split())

    return call


@pytest.mark.parametrize("policy", ["layer_threshold", "tail_mass", "top_p"])
@pytest.mark.parametrize("target", [0.3])
def test_the_threshold_skips_what_was_asked_and_little_more(stats, policy, target):
    given = stats if policy == "layer_threshold" else None
    found = find_threshold(MODEL, policy, target, IDS_BT, stats=given)
    assert target <= found.skipped <= target + 0.03
    assert found.skipped == skipped_by(MODEL, found.plan, IDS_BT, stats=given)
    assert len(found.tried) <= 10
    kept = 0
    with share(MODEL, found.plan, stats=given, exempt_prefill=False, observe=lambda *seen: counts.append(seen[2])):
        counts: list = []
        MODEL(IDS_BT)
        kept = sum(int((outcome.routing.weights_NK != 0).sum()) for outcome in counts)
    assert 1 - kept / (2 * IDS_BT.numel() * 4) == pytest.approx(found.skipped)


def test_thresholds_out_of_reach(stats):
    with pytest.raises(CarpoolError, match=r"skips 0.750 of the pairs, not 0.900"):
        find_threshold(MODEL, "layer_threshold", 0.9, IDS_BT, stats=stats)
    with pytest.raises(CarpoolError, match="no threshold to search for"):
        find_threshold(MODEL, "xshare", 0.5, IDS_BT)
    with pytest.raises(CarpoolError, match="carpool calibrate MODEL --sensitivity"):
        find_threshold(MODEL, "layer_threshold", 0.5, IDS_BT)


def test_allow_list_of_a_domain(command, stats):
    code, output = command("allow-list", "stats.safetensors", "--size", "3", "--domain", "b.c", "-o", "out.json")
    assert code == 0, output
    assert "3 of 8 experts in 2 layers for b.c; wrote out.json" in output
    loaded = PolicyFile.load("out.json")
    for index, tensors in stats.layers.items():
        best = tensors["easy_ep/b.c"].topk(3).indices.tolist()
        assert loaded.plan_for(index).policy.experts == tuple(sorted(best))
    used: dict[int, set[int]] = {}
    with share(MODEL, loaded, exempt_prefill=False, observe=lambda *seen: used.update({seen[0]: seen[2]})):
        MODEL(IDS_BT)
    for place, index in enumerate(stats.layers):
        read_E = used[place].union_SE.any(0)
        assert set(read_E.nonzero().flatten().tolist()) == set(loaded.plan_for(index).policy.experts)


def test_allow_list_of_the_one_domain_that_begins_so(command, stats):
    def listing(domain, *more):
        """With the scores of domain `a` under more names."""
        known = {f"{kind}/{name}": f"{kind}/a" for name in more for kind in ("easy_ep", "coverage")}
        layers = {i: t | {new: t[old] for new, old in known.items()} for i, t in stats.layers.items()}
        dataclasses.replace(stats, layers=layers).save("named.safetensors")
        return command("allow-list", "named.safetensors", "--size", "3", "--domain", domain)[1]

    assert "for b.c; wrote" in listing("b")
    assert "for a; wrote" in listing("a", "a2")  # an exact name is no beginning of another
    assert "no domain 'b'; they know 'a', 'b.c', 'b2'" in listing("b", "b2")


def test_experts_that_no_token_reached_are_named(command, stats):
    layers = {i: {**t, "coverage/a": torch.zeros(8, dtype=torch.int64)} for i, t in stats.layers.items()}
    dataclasses.replace(stats, layers=layers).save("bare.safetensors")
    code, output = command("allow-list", "bare.safetensors", "--size", "0.5", "--domain", "a")
    assert code == 0
    first = PolicyFile.load("policy.json").plan_for(0).policy.experts[0]
    assert f"warning: on the list without any token that reached them (layer:expert): 0:{first}" in output


def test_threshold_writes_a_policy_file(command):
    arguments = ("threshold", "--skip", "0.4", "--text", "text.txt", "--tokens", "320", "--sequence", "32")
    code, output = command(*arguments, "--stats", "stats.safetensors", "-o", "out.json")
    assert code == 0, output
    loaded = PolicyFile.load("out.json")
    assert str(loaded.plan) in output
    assert loaded.statistics == Path("stats.safetensors")
    assert min(point["skipped"] for point in loaded.curve) < 0.4 <= max(point["skipped"] for point in loaded.curve)
    with share(MODEL, loaded, exempt_prefill=False) as run:
        MODEL(IDS_BT)
    assert run.changed_rows() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("allow-list", "stats.safetensors", "--domain", "law"), "have no domain 'law'; they know 'a', 'b.c'"),
        (("allow-list", "stats.safetensors", "--domain", ""), "have no domain ''; they know 'a', 'b.c'"),
        (("allow-list", "stats.safetensors", "--size", "many"), "--size 'many': give a number of experts"),
        (("allow-list", "nowhere.safetensors", "--size", "nan"), "--size 'nan': give a number of experts"),
        (("allow-list", "nowhere.safetensors", "--size", "0"), "--size '0': give a number of experts"),
        (("threshold", "--skip", "2"), "--skip 2.0: give 0 to 1"),
        (("threshold", "--skip", "nan"), "--skip nan: give 0 to 1"),
        (("threshold", "--tokens", "3"), "--tokens 3: give 256 or more"),
        (("threshold", "--sequence", "3"), "--sequence 3: give 8 or more"),
        (("allow-list", "stats.safetensors", "--size", "9"), "asks for 9 of 8"),
        (("allow-list", "stats.safetensors", "--fill", "x"), "use 'backfill' or 'drop'"),
        (("threshold", "--text", "text.txt"), "needs --stats"),
        (("threshold", "--text", "text.txt", "--policy", "top_p", "--stats", "stats.safetensors"), "no statistics"),
        (("threshold", "--stats", "stats.safetensors", "-o", "../out.json"), "one folder"),
    ],
)
def test_refused_in_one_sentence(command, arguments, message):
    code, output = command(*arguments)
    assert code == 2
    assert message in output
    assert not Path("policy.json").exists()


def test_statistics_without_scores(command, stats):
    layers = {i: {n: x for n, x in t.items() if "/" not in n and n != "easy_ep"} for i, t in stats.layers.items()}
    dataclasses.replace(stats, layers=layers).save("bare.safetensors")
    code, output = command("allow-list", "bare.safetensors")
    assert code == 2
    assert "carpool calibrate MODEL --energy" in output


def test_policies_lists_guards(command):
    code, output = command("policies")
    assert code == 0
    for shown in ("xshare_expert_parallel", "layer_threshold", "short_circuit", "min_batch", "protect", "decode_only"):
        assert shown in output


def test_a_guard_is_given_once():
    with pytest.raises(CarpoolError, match="floor is given twice in 'oea"):
        parse("oea(k0=1) | floor(0.1) | decode_only | floor(0.2)")
