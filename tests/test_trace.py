"""Traces: what a file holds, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trace_tools import FACTS, same, some_trace

from carpool import CarpoolError
from carpool.artefacts.files import read_safetensors
from carpool.artefacts.trace import LEAST, Trace
from carpool.artefacts.trace_writer import TraceWriter


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 9), st.sampled_from([8, 256, 300]))
def test_what_is_written_in_parts_is_what_is_read(tmp_path_factory, steps, seed, num_experts):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    trace = some_trace(steps, replace(FACTS, num_experts=num_experts), seed=seed)
    trace.save(path)
    assert same(Trace.load(path), trace)
    whole = path.read_bytes()
    write_parts(path, [trace.select(rows) for rows in trace.steps()])
    assert path.read_bytes() == whole
    assert [rows.stop - rows.start for rows in trace.steps()] == list(steps)
    assert {name: one.dtype for name, one in load_file(path).items()} == {
        name: one.dtype for name, one in trace.tensors().items()
    }


def test_parts_of_a_trace():
    trace = some_trace((3, 1, 2, 2))
    assert same(trace.of_phase("decode"), trace.select(slice(3, None)))
    assert [len(part) for part in trace.windows(2)] == [4, 4]
    assert [len(part) for part in trace.windows(3)] == [3, 1, 4]
    with pytest.raises(CarpoolError, match="4 steps does not split into 5"):
        trace.windows(5)
    with pytest.raises(CarpoolError, match="no row of phase prefill"):
        trace.of_phase("decode").of_phase("prefill")


def test_weights_that_float16_would_lose_are_kept_above_zero():
    experts_TLK = torch.tensor([[[0, 1]]])
    facts = replace(FACTS, layers=(0,))
    kept = Trace.of(experts_TLK, facts, step_T=torch.zeros(1), weights_TLK=torch.tensor([[[1.0, 1e-12]]]))
    assert kept.weights_TLK is not None
    assert kept.weights_TLK[0, 0].tolist() == [1.0, LEAST]
    freed = Trace.of(experts_TLK * 0, facts, step_T=torch.zeros(1), weights_TLK=torch.tensor([[[1.0, 0.0]]]))
    assert len(freed) == 1


def write_parts(path, parts):
    with TraceWriter(path) as writer:
        for part in parts:
            writer.add(part)


def changed(trace, **tensors):
    return lambda: replace(trace, **tensors)


BASE = some_trace()
BAD = {
    "names expert 9 of 8": changed(BASE, experts_TLK=torch.full_like(BASE.experts_TLK, 9)),
    "row 0 of the trace chooses an expert twice": changed(BASE, experts_TLK=BASE.experts_TLK * 0),
    "experts of the trace are torch.int64": changed(BASE, experts_TLK=BASE.experts_TLK.long()),
    r"not \[6, 4\]": changed(BASE, experts_TLK=BASE.experts_TLK.flatten(1)),
    "negative, NaN or infinite": changed(BASE, weights_TLK=BASE.weights_TLK * float("nan")),
    "not in the order of their steps": changed(BASE, step_T=BASE.step_T.flip(0)),
    "negative position": changed(BASE, position_T=BASE.position_T - 1),
    "request of the trace are torch.int32 of shape": changed(BASE, request_T=BASE.request_T[1:]),
    "phase 2; they are prefill, decode": changed(BASE, phase_T=BASE.phase_T + 1),
    r"2 layers and names them \[1\]": changed(BASE, facts=replace(FACTS, layers=(1,))),
    r"names them \[3, 1\]": changed(BASE, facts=replace(FACTS, layers=(3, 1))),
    "claims 2 of 1 experts": changed(BASE, facts=replace(FACTS, num_experts=1)),
    "a request 5 and names the domains of 2": changed(
        BASE, request_T=BASE.position_T, facts=replace(FACTS, domains=("a", "b"))
    ),
    "names experts 0 to 8 of 8": lambda: Trace.of(torch.tensor([[[0, 8]]]), FACTS, step_T=torch.zeros(1)),
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_trace_is_refused(said):
    with pytest.raises(CarpoolError, match=said):
        BAD[said]()


@pytest.mark.parametrize(
    ("said", "spoil"),
    [
        ("is no trace of carpool", lambda tensors, metadata: metadata.clear()),
        ("has schema '7'", lambda tensors, metadata: metadata.update(carpool_trace="7")),
        ("its tensors are", lambda tensors, metadata: tensors.pop("step")),
        ("its tensors are", lambda tensors, metadata: tensors.update(text=torch.zeros(1))),
        ("checksum differs", lambda tensors, metadata: tensors.update(request=tensors["request"] + 1)),
        ("checksum differs", lambda tensors, metadata: metadata.update(checksum="0")),
        ("is missing or unknown", lambda tensors, metadata: metadata.update(facts="{}")),
        ("what the trace says of itself", lambda tensors, metadata: metadata.update(facts="{")),
        ("'seed' is 'x'", lambda tensors, metadata: metadata.update(facts=metadata["facts"].replace(": 0}", ': "x"}'))),
        ("must list pairs", lambda tensors, metadata: metadata.update(
            facts=metadata["facts"].replace('[["carpool", "0.1"]]', '["carpool"]'))),
        ("must list numbers", lambda tensors, metadata: metadata.update(
            facts=metadata["facts"].replace("[1, 3]", '["1", "3"]'))),
    ],
)  # fmt: skip
def test_a_file_that_was_meddled_with_is_refused(said, spoil, tmp_path):
    path = tmp_path / "t.safetensors"
    some_trace().save(path)
    tensors, metadata = read_safetensors(path)
    spoil(tensors, metadata)
    save_file(tensors, path, metadata or None)
    with pytest.raises(CarpoolError, match=said):
        Trace.load(path)


def test_a_trace_without_weights_can_be_read(tmp_path):
    trace = Trace.of(torch.tensor([[[0], [1]], [[2], [3]]]), FACTS, step_T=torch.tensor([0, 0]))
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(tmp_path / "t.safetensors")
    assert loaded.weights_TLK is None
    assert same(loaded, trace)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.safetensors"
    some_trace().save(path)
    before = path.read_bytes()
    one = some_trace((1,))
    for said, parts in (
        ("order of their steps", (some_trace((1, 1)), one)),
        ("different models or texts", (one, some_trace((1,), replace(FACTS, seed=3)))),
        ("do not follow", (one, some_trace((1,), top_k=3))),
        ("nothing was recorded", ()),
    ):
        with pytest.raises(CarpoolError, match=said):
            write_parts(path, parts)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["t.safetensors"]
