"""Recording a trace on a tiny model, and `carpool trace`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lockstep_tools import NumberTokenizer, opening, small_model, write_texts
from trace_tools import FACTS, same, some_trace
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.artefacts.texts import load_texts
from carpool.artefacts.trace import Trace
from carpool.cli.commands import app
from carpool.evaluate.sequences import Cut
from carpool.hosts.transformers import find_layers, identity
from carpool.hosts.transformers.tracing import watching


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `carpool trace` on a tiny model; gives exit code and all output in one line."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    monkeypatch.setattr("carpool.hosts.transformers.open_model", opening(model, NumberTokenizer()))
    texts = [part for path in write_texts(tmp_path) for part in ("--text", path.name)]

    def call(*arguments):
        result = CliRunner().invoke(app, ["trace", *arguments, *texts])
        return result.exit_code, " ".join(result.output.split())

    call.model = model
    return call


def test_the_command_records_what_step_by_step_decoding_chooses(command):
    small = ("--tokens", "128", "--batch", "4", "--sequence", "16", "--prefill", "6", "-o", "t.safetensors")
    code, output = command("some/model", *small)
    assert code == 0, output
    assert "wrote t.safetensors: 128 tokens of 8 sequences in 2 batches of 4" in output
    trace = Trace.load("t.safetensors")
    trace.check(identity(find_layers(command.model)))
    assert [rows.stop - rows.start for rows in trace.steps()] == ([24] + [4] * 10) * 2
    assert set(trace.facts.domains) == {"code", "prose"}
    assert trace.facts.expert_bytes == 2 * 3 * 32 * 16
    assert [name for name, _ in trace.facts.data] == ["code.jsonl", "prose.jsonl"]
    for rows in trace.steps():
        part = trace.select(rows)
        assert len({*part.phase_T.tolist()}) == 1
        if part.phase_T[0]:
            assert len({*part.position_T.tolist()}) == 1  # lockstep
            assert len({*part.request_T.tolist()}) == 4
    once = torch.stack([trace.request_T, trace.position_T]).unique(dim=1)
    assert once.shape[1] == len(trace)
    assert code == command("record", "some/model", *small)[0]  # `record` may be said
    assert same(replace(Trace.load("t.safetensors"), facts=trace.facts), trace)

    # beside a loop of our own, token by token with a cache
    cut = Cut.of(load_texts(["code.jsonl", "prose.jsonl"]), NumberTokenizer(), length=16, seed=0)
    ids_BT = cut.draw(1, 8, seed=0).ids_ST[:4, :-1]
    with torch.inference_mode(), watching(find_layers(command.model)) as choices:
        cache = command.model(input_ids=ids_BT[:, :6], use_cache=True).past_key_values
        choices.take(24)
        for position in range(6, 16):
            command.model(input_ids=ids_BT[:, position : position + 1], past_key_values=cache, use_cache=True)
            experts_NLK, weights_NLK = choices.take(4)
            rows = (trace.position_T == position) & (trace.request_T < 4)
            part = trace.select(rows)
            assert torch.equal(part.experts_TLK.long(), experts_NLK)
            assert torch.allclose(part.weights_TLK.float(), weights_NLK, atol=1e-3)


def test_the_command_says_what_is_wrong(command, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, said in (
        (("--prefill", "0"), "--prefill 0: give 1"),
        (("--sequence", "20", "--prefill", "20"), "--sequence 20: give 21"),
        (("-o", "t.json"), "a .safetensors file"),
        (("--batch", "400", "--sequence", "40"), "lower --batch or --sequence"),
    ):
        code, output = command("some/model", *arguments)
        assert code == 2, output
        assert said in output
    assert {path.name for path in tmp_path.iterdir()} == before


def test_no_text_is_in_the_file(command):
    assert command("some/model", "--tokens", "64", "--batch", "2", "--sequence", "16", "--prefill", "6")[0] == 0
    header = json.loads(Path("trace.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    assert "data" in header["__metadata__"]["facts"]
    assert not {"ids", "text"} & set(header)


def test_another_models_trace_is_refused():
    known = identity(find_layers(small_model()))
    for facts, said in ((FACTS, "Some, 2 layers, 2 of 8 experts"), (replace(FACTS, layers=(0, 1)), "routers ffff")):
        with pytest.raises(CarpoolError, match=said):
            some_trace(facts=facts).check(known)
    some_trace(facts=replace(FACTS, layers=(0, 1), fingerprint="")).check(known)
