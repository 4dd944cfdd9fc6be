"""Pools and questions as files: what is read, and that all else is refused in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from fuzz_targets import allowed, odd_json
from safetensors.torch import save_file

from carpool import CarpoolError
from carpool.models.pool import Expert, Pool
from carpool.models.questions import load_questions

GOOD = '[[expert]]\nname = "a"\nengine = "transformers"\nmodel = "m"\n'
SERVER = '[[expert]]\nname = "s"\nengine = "server"\nmodel = "m"\nurl = "http://localhost:8000/v1"\n'


def pool(tmp_path: Path, text: str) -> Pool:
    path = tmp_path / "pool.toml"
    path.write_text(text)
    return Pool.load(path)


def test_a_pool_is_read(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"w": torch.zeros(64, 64)}, tmp_path / "m" / "model.safetensors")
    found = pool(tmp_path, GOOD + 'stop = ["\\n"]\nmax_tokens = 5\n' + SERVER)
    assert found.names == ["a", "s"]
    a = found["a"]
    assert Path(a.model) == tmp_path / "m"
    assert (a.stop, a.max_tokens) == (("\n",), 5)
    assert a.bytes == (tmp_path / "m" / "model.safetensors").stat().st_size > 64 * 64 * 4
    assert found["s"].bytes == 0
    before = found.fingerprint
    assert pool(tmp_path, GOOD + 'stop = ["\\n"]\nmax_tokens = 5\n' + SERVER).fingerprint == before
    save_file({"w": torch.ones(64, 64)}, tmp_path / "m" / "model.safetensors")
    assert pool(tmp_path, GOOD + 'stop = ["\\n"]\nmax_tokens = 5\n' + SERVER).fingerprint != before


REFUSED = {
    "": "something else than",
    "expert = 3": "something else than",
    "x = [": "no pool in TOML",
    GOOD + GOOD: "two experts named 'a'",
    GOOD + "colour = 3": "unknown setting 'colour'",
    GOOD + 'max_tokens = "3"': "should be of type int",
    GOOD + "max_tokens = true": "should be of type int",
    GOOD + "max_tokens = 0": "max_tokens=0",
    GOOD + "stop = [3]": "stop is a list of texts",
    GOOD + 'prompt = "hello"': "no {question}",
    GOOD + 'system = "be kind"': "need chat = true",
    GOOD + 'url = "http://127.0.0.1/v1"': "a server, and nothing else",
    '[[expert]]\nname = "a"': "it needs engine, model",
    '[[expert]]\nname = " "\nengine = "vllm"\nmodel = "m"': "without a name",
    '[[expert]]\nname = "a"\nengine = "onnx"\nmodel = "m"': "engine 'onnx'",
    SERVER.replace("localhost:8000", "example.org"): "no address on loopback",
    SERVER.replace("http://localhost:8000/v1", "ftp://[::1"): "no address on loopback",
    "expert = []": "without experts",
}


@pytest.mark.parametrize("text", REFUSED, ids=list(REFUSED.values()))
def test_bad_pools_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CarpoolError, match=REFUSED[text]) as caught:
        pool(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_an_unknown_expert_is_named() -> None:
    with pytest.raises(CarpoolError, match="no expert 'b' in the pool; it has a"):
        Pool((Expert("a", "vllm", "m"),))["b"]


LINES = {
    '{"id": 1, "question": "?"}\n{"id": 1, "question": "!"}': 'have the "id" of another',
    '{"question": 3}': "line 1: a question is an object",
    "[]": "line 1: a question is an object",
    "\n\n{": "line 3 is not JSON",
    "": "holds no questions",
    '{"question": "?", "choices": ["a"], "answer": 0}': "two choices or more",
    '{"question": "?", "choices": ["a", "b"], "answer": 2}': "two choices or more",
    '{"question": "?", "choices": ["a", "b"], "answer": "a"}': "two choices or more",
    '{"question": "?", "choices": "ab"}': "choices is a list of texts",
    '{"question": "?", "skills": [1]}': "skills is a list of texts",
    '{"question": "?", "answer": [1]}': "the answer is a text",
}


@pytest.mark.parametrize("text", LINES, ids=list(LINES.values()))
def test_bad_questions_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(CarpoolError, match=LINES[text]):
        load_questions(path)


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"id": "x", "question": "2+2?", "answer": 4, "skills": ["sums"]}\n\n{"question": "?", "choices": ["a", "b"]}\n'
    )
    first, second = load_questions(path)
    assert (first.id, first.answer, first.skills) == ("x", 4, ("sums",))
    assert (second.id, second.choices, second.answer) == ("3", ("a", "b"), None)
    with pytest.raises(CarpoolError, match="cannot read the questions"):
        load_questions(tmp_path / "none")


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_given_it_is_read_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "f"
    text = GOOD + SERVER
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(text))
        piece = rng.choice(["\0", '"', "[", "=", "\n", "é", "9" * 400, "-inf", "[[expert]]"])
        text = text[:at] + piece + text[at + rng.randrange(3) :]
    path.write_text(text, encoding="utf-8")
    allowed(lambda: Pool.load(path))
    lines = [
        json.dumps({"question": odd_json(rng), "choices": odd_json(rng), "answer": odd_json(rng)}) for _ in range(3)
    ]
    path.write_text("\n".join(lines))
    allowed(lambda: load_questions(path))
