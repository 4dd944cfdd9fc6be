"""`carpool place`: the table, what is recommended, files for engines, and refusals in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from placement_tools import random_trace
from typer.testing import CliRunner

from carpool.cli.commands import app
from carpool.placement.placement_file import PlacementFile


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `carpool place` beside a trace; gives exit code and all output in one line."""
    monkeypatch.chdir(tmp_path)
    trace = random_trace(96, 3, 8, 2, seed=1)
    replace(trace, facts=replace(trace.facts, layers=(1, 2, 3))).save(tmp_path / "trace.safetensors")

    def call(*arguments):
        result = CliRunner().invoke(app, ["place", *arguments])
        return result.exit_code, " ".join(result.output.split())

    return call


def test_planners_are_compared_and_the_useless_ones_named(command):
    code, output = command("--devices", "4", "--nodes", "2", "--dispatch", "allgather")
    assert code == 0, output
    for name in ("linear", "round-robin", "random", "eplb", "fan-out", "exflow", "moetuner"):
        assert name in output
    assert "planned on 6 decode steps, scored on the next 6" in output
    assert "fan-out is not recommended: with allgather as much is sent wherever" in output
    assert "exflow is not recommended: with allgather a token goes home between layers" in output
    assert "experts that the busiest device reads: " in output
    code, output = command("--devices", "4", "--cost", "1,1,0,0.1,100", "--share", "xshare_expert_parallel(0.5)")
    assert code == 0, output
    assert "predicted microseconds of a layer: " in output
    assert "xshare_expert_parallel(0.5) on linear: experts of the busiest device" in output
    assert "displaced" in output


def test_experts_that_divide_with_replicas_alone_are_placed_with_replicas(command):
    code, output = command("--devices", "3", "--redundant", "1", "--planner", "eplb + replicas", "-o", "placement.json")
    assert code == 0, output
    assert "planners without replicas are left out: 8 experts do not divide among 3 devices" in output
    assert "linear" in output
    assert "fan-out" not in output
    assert PlacementFile.load("placement.json").placement.slots == 3
    code, output = command("--devices", "3", "--redundant", "1", "--planner", "exflow", "-o", "other.json")
    assert code == 2
    assert "exflow places every expert once, and 8 do not divide among 3 devices: use one of linear, eplb +" in output


def test_prefill_says_what_moving_experts_does(command):
    trace = random_trace(96, 3, 8, 2, batch=24, seed=1)
    replace(trace, phase_T=trace.phase_T * 0).save("prompts.safetensors")
    code, output = command("--trace", "prompts.safetensors", "--devices", "4", "--phase", "prefill")
    assert code == 0, output
    assert "LLEP: peak tokens" in output
    assert "MoEShard: 1.00" in output


def test_plans_are_written_for_engines(command):
    code, output = command("--devices", "4", "--planner", "exflow", "-o", "placement.json")
    assert code == 0, output
    found = PlacementFile.load("placement.json")
    assert (found.placement.method, found.layers, found.placement.devices) == ("exflow", (1, 2, 3), 4)
    code, output = command(
        "--devices", "4", "--redundant", "4", "--planner", "eplb + replicas", "--format", "sglang", "-o", "s.json"
    )
    assert code == 0, output
    assert "taken to end with layer 3" in output
    assert torch.tensor(json.loads(Path("s.json").read_text())["physical_to_logical_map"]).shape == (4, 12)
    assert command("--devices", "4", "--format", "ktransformers", "-o", "k.pt")[0] == 0
    assert torch.load("k.pt", weights_only=True)["logical_count"].shape == (1, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--devices", "3"), "8 experts and 0 redundant ones do not fill 3 devices evenly: give --redundant 1, 4"),
        (("--devices", "4", "--nodes", "3"), "4 devices do not divide into 3 nodes"),
        (("--devices", "0"), "--devices 0: give 1"),
        (("--dispatch", "pigeons"), "--dispatch pigeons: use one of"),
        (("--phase", "prefill"), "no row of phase prefill"),
        (("--phase", "all"), "--phase all: use prefill or decode"),
        (("--format", "onnx", "-o", "x.json"), "--format onnx: use one of"),
        (("--planner", "exflow"), "name a file, -o placement.json"),
        (("--planner", "best", "-o", "x.json"), "no planner is named 'best'"),
        (("-o", "plan.txt"), "a .json file"),
        (("--trace", "none.safetensors"), "cannot read none.safetensors"),
        (("--cost", "1,2"), "--cost '1,2': give a,b,c,d"),
        (("--devices", "4", "--share", "sere(top=1, threshold=0.5)"), "needs statistics"),
    ],
)
def test_bad_input_gets_one_sentence_and_no_file(command, arguments, said):
    before = set(Path().iterdir())
    code, output = command(*arguments)
    assert code == 2, output
    assert said in output
    assert "Traceback" not in output
    assert set(Path().iterdir()) == before


def test_a_trace_of_another_model_is_refused(command, monkeypatch):
    tiny = pytest.importorskip("lockstep_tools")
    monkeypatch.setattr("carpool.hosts.transformers.open_model", tiny.opening(tiny.small_model(), None))
    code, output = command("some/model", "--devices", "4")
    assert code == 2
    assert "the trace is of another model" in output
