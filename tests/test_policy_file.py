"""Policy files: what is written is read back, and bad files are refused in one sentence."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.artefacts.identity import Identity
from carpool.errors import CarpoolError
from carpool.plans.grammar import parse
from carpool.plans.policy_file import PolicyFile


def write(folder: Path, **content) -> Path:
    path = folder / "policy.json"
    path.write_text(json.dumps({"schema": 1, "policy": "xshare(budget=8) | floor(0.5)"} | content))
    return path


def test_round_trip(tmp_path):
    statistics = tmp_path / "stats.safetensors"
    statistics.write_bytes(b"any bytes")
    made = PolicyFile(
        parse("xshare(budget=8) | floor(0.5)"),
        layers={3: {"budget": 4}, 0: {"floor": 0.1}},
        model={"num_experts": 64},
        statistics=statistics,
        curve=({"union": 0.5, "kl": 0.01},),
    )
    made.save(tmp_path / "policy.json")
    assert PolicyFile.load(tmp_path / "policy.json") == made


def test_layers_differ_only_in_what_they_set(tmp_path):
    loaded = PolicyFile.load(write(tmp_path, layers={"3": {"budget": 4}, "5": {"floor": 0.25}}))
    assert str(loaded.plan_for(0)) == "xshare(budget=8) | floor(0.5)"
    assert str(loaded.plan_for(3)) == "xshare(budget=4) | floor(0.5)"
    assert str(loaded.plan_for(5)) == "xshare(budget=8) | floor(0.25)"


def test_the_settings_of_every_layer_must_fit_the_model():
    PolicyFile(parse("xshare(budget=8)"), {3: {"budget": 16}}).check(16, 2)
    with pytest.raises(CarpoolError, match="asks for 16 of 8 experts"):
        PolicyFile(parse("xshare(budget=8)"), {0: {"budget": 4}, 3: {"budget": 16}}).check(8, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"schema": 2}, "schema 2"),
        ({"polcy": "x"}, "unknown key 'polcy'"),
        ({"policy": None}, "None"),
        ({"policy": "nope(1)"}, "unknown policy or guard 'nope'"),
        ({"layers": []}, "must be objects"),
        ({"schema": True}, "schema True"),
        ({"curve": 5}, "'curve' must be a list"),
        ({"layers": {"00": {}}}, "'00' is no layer index"),
        ({"layers": {"1": {"budget": float("inf")}}}, "finite"),
        ({"layers": {"x": {}}}, "'x' is no layer index"),
        ({"layers": {"1": 3}}, "settings of layer 1"),
        ({"layers": {"1": {"size": 3}}}, "sets 'size'"),
        ({"layers": {"1": {"utility": "loud"}}}, "utility='loud'"),
        ({"layers": {"1": {"floor": 2}}}, "floor(2)"),
        ({"model": {"experts": 3}}, "no entry 'experts'"),
        ({"model": {"top_k": "8"}}, "top_k '8'; give a whole number"),
        ({"model": {"num_experts": True}}, "num_experts True"),
        ({"model": {"fingerprint": None}}, "fingerprint None"),
        ({"statistics": {"file": "../up.safetensors", "sha256": "0"}}, "same folder"),
        ({"statistics": {"file": "gone.safetensors", "sha256": "0"}}, "not there"),
        ({"statistics": {"file": "policy.json", "sha256": "0"}}, "sha256 differs"),
    ],
)
def test_bad_content_is_refused(tmp_path, content, says):
    with pytest.raises(CarpoolError) as refusal:
        PolicyFile.load(write(tmp_path, **content))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_for_another_model_is_refused(tmp_path):
    loaded = PolicyFile.load(write(tmp_path, layers={"7": {"budget": 4}}, model={"fingerprint": "ab"}))
    loaded.check_layers([6, 7])
    loaded.check_model(Identity("ab", (6, 7), 64, 8, None))
    with pytest.raises(CarpoolError, match="sets layer 7, which is no MoE layer"):
        loaded.check_layers([0, 1, 2])
    with pytest.raises(CarpoolError, match="of another model"):
        loaded.check_model(Identity("cd", (6, 7), 64, 8, None))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_layers": 999}, "MoE layers: 999, this one has 2"),
        ({"num_experts": 8}, "experts: 8, this one has 64"),
        ({"top_k": 2}, "experts a token: 2, this one has 8"),
    ],
)
def test_counts_are_compared_where_there_is_no_fingerprint(tmp_path, facts, message):
    right = {"num_layers": 2, "num_experts": 64, "top_k": 8}
    mine = Identity("ab", (6, 7), 64, 8, None)
    PolicyFile.load(write(tmp_path, model=right)).check_model(mine)
    with pytest.raises(CarpoolError, match=message):
        PolicyFile.load(write(tmp_path, model=right | facts)).check_model(mine)


def test_missing_file(tmp_path):
    with pytest.raises(CarpoolError, match="cannot read the policy file"):
        PolicyFile.load(tmp_path / "none.json")


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "policy.json"
    path.write_bytes(data)
    with pytest.raises(CarpoolError):
        PolicyFile.load(path)


@given(position=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_flipped_bit_never_escapes_as_another_error(tmp_path_factory, position, bit):
    path = write(tmp_path_factory.mktemp("flip"), layers={"3": {"budget": 4, "floor": 0.5}}, model={"top_k": 8})
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))
    with contextlib.suppress(CarpoolError):
        PolicyFile.load(path)
