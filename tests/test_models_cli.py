"""`carpool models`: a pool of tiny experts from check to cascade; bad input is one sentence, answers are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_experts import write_expert
from typer.testing import CliRunner

from carpool.cli.commands import app
from carpool.models.questions import Answers
from carpool.models.runners import in_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate("ab"):
        write_expert(root / name, seed, ends=False)
    experts = [
        f'[[expert]]\nname = "{name}"\nengine = "transformers"\nmodel = "{name}"\nmax_tokens = 4\n' for name in "ab"
    ]
    (root / "pool.toml").write_text("\n".join(experts))
    lines = [
        {
            "id": n,
            "question": f"so {n}",
            "choices": [f" {n}", " no", " z"],
            "answer": n % 3,
            "skills": ["sums", "odd"][: 1 + n % 2],
        }
        for n in range(60)
    ]
    (root / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int = 0) -> str:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["models", *arguments])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return " ".join(done.output.split())


def test_from_check_to_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run(folder, monkeypatch, "check", "pool.toml")
    assert "2 models to load for 2 experts" in said
    assert "fusion token by token: yes" in said
    found = json.loads(run(folder, monkeypatch, "check", "pool.toml", "--json"))
    assert found["bytes"] == sum(one["bytes"] for one in found["experts"]) > 10_000
    said = run(folder, monkeypatch, "profile", "pool.toml", "-q", "q.jsonl")
    assert "wrote profile.json" in said
    for plan, loads in (("xshare(1, warmup=0)", 1), ("random", 2)):
        name = f"{plan[:4]}.jsonl"
        given = ("answer", "pool.toml", "-q", "q.jsonl", "--plan", plan, "-a", name, "-o", "voted.jsonl")
        said = run(folder, monkeypatch, *given)
        assert f"model by model: {loads} loads" in said
        assert f"experts used: {loads}" in said
        assert len(Answers(folder / name).by_key) == 60
        voted = [json.loads(line) for line in (folder / "voted.jsonl").read_text().splitlines()]
        assert [one["id"] for one in voted] == [str(n) for n in range(60)]
        assert {one["answer"] for one in voted} <= {0, 1, 2}
        assert "no model was loaded" in run(folder, monkeypatch, *given), "all of it was there"
        run(folder, monkeypatch, *given, "--aggregator", "b")
        assert len([1 for key in Answers(folder / name).by_key if key[0].endswith("#combined")]) == 60


def test_a_cascade_of_equals_is_refused_and_its_answers_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "cascade",
        "pool.toml",
        "-q",
        "q.jsonl",
        "--weak",
        "a",
        "--strong",
        "b",
        "--max-loss",
        "0.5",
        "-a",
        "c.jsonl",
    )
    said = run(folder, monkeypatch, *given, code=2)
    assert "carpool models cascade: every answer of the weak model may stand" in said
    assert "use it alone" in said
    assert len(Answers(folder / "c.jsonl").by_key) == 120
    assert not (folder / "gate.json").exists()


def test_a_gate_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = {"schema": 1, "weights": [1.0], "scores": [0.0], "values": [0.5], "cut": 0.02, "kept": 0.5, "loss": 0.0,
            "gain": 0.1, "error": 0.01}  # fmt: skip
    (folder / "given.json").write_text(json.dumps(gate))
    given = ("--weak", "a", "--strong", "b", "--gate", "given.json", "-a", "g.jsonl", "-o", "out.jsonl")
    said = run(folder, monkeypatch, "cascade", "pool.toml", "-q", "q.jsonl", *given)
    passed = int(said.partition("b was asked ")[2].split()[0])
    kept = Answers(folder / "g.jsonl")
    assert sum(expert == "b" for _, expert in kept.by_key) == passed
    unsure = sum(one.confidence["margin"] < 0.02 for one in kept.by_key.values() if one.expert == "a")
    assert 0 < passed == unsure < 60


def test_an_expert_that_dies_in_mid_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, asked = in_transformers.InTransformers._choose, []

    def dies(self, expert, question):
        asked.append(question.id)
        if len(asked) == 40:
            raise RuntimeError("CUDA out of memory")
        return choose(self, expert, question)

    monkeypatch.setattr(in_transformers.InTransformers, "_choose", dies)
    said = run(folder, monkeypatch, "profile", "pool.toml", "-q", "q.jsonl", "-a", "p.jsonl", "-o", "p.json", code=2)
    assert "a failed (CUDA out of memory); 32 finished answers are kept, run again to go on" in said
    monkeypatch.setattr(in_transformers.InTransformers, "_choose", choose)
    run(folder, monkeypatch, "profile", "pool.toml", "-q", "q.jsonl", "-a", "p.jsonl", "-o", "p.json")
    assert len(Answers(folder / "p.jsonl").by_key) == 120


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "no.toml"), "cannot read the pool no.toml"),
        (("profile", "pool.toml", "-q", "no.jsonl"), "cannot read the questions no.jsonl"),
        (("profile", "pool.toml", "-q", "plain.jsonl"), "no question of plain.jsonl names a skill"),
        (("profile", "gone.toml", "-q", "q.jsonl", "-a", "gone.jsonl"), "no server answers at http://127.0.0.1:9/v1"),
        (("answer", "pool.toml", "-q", "q.jsonl", "-p", "no.json"), "cannot read the profile no.json"),
        (("answer", "pool.toml", "-q", "q.jsonl", "-p", "stale.json"), "the profile is stale"),
        (("answer", "pool.toml", "-q", "q.jsonl", "-o", "x.txt"), "a .jsonl file"),
        (("cascade", "pool.toml", "-q", "q.jsonl", "--weak", "a", "--strong", "z"), "no expert 'z' in the pool"),
        (("cascade", "pool.toml", "-q", "q.jsonl", "--weak", "a", "--strong", "b", "--gate", "q.jsonl"), "not JSON"),
        (("cascade", "pool.toml", "-q", "q.jsonl", "--weak", "a", "--strong", "a"), "are both a"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    (folder / "plain.jsonl").write_text('{"question": "?"}')
    stale = {"schema": 1, "experts": ["a", "b"], "pool": "x", "skills": ["s"], "balance_ES": [[1], [2]],
             "right_E": [0.5, 0.5], "questions": 3}  # fmt: skip
    (folder / "stale.json").write_text(json.dumps(stale))
    (folder / "gone.toml").write_text(
        '[[expert]]\nname = "s"\nengine = "server"\nmodel = "m"\nurl = "http://127.0.0.1:9/v1"\n'
    )
    shown = run(folder, monkeypatch, *arguments, code=2)
    assert said in shown
    assert shown.startswith(f"carpool models {arguments[0]}: ")


def test_questions_without_a_known_skill_go_by_competence_and_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"question": f"so {n}", "choices": [" a", " b"], "skills": ["sums"] if n else []} for n in range(3)]
    (folder / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(folder, monkeypatch, "profile", "pool.toml", "-q", "q.jsonl", "-a", "s.jsonl", "-o", "s.json")
    said = run(folder, monkeypatch, "answer", "pool.toml", "-q", "some.jsonl", "-p", "s.json", "-a", "t.jsonl")
    assert "1 questions name no skill of the profile; they went by overall competence" in said


def test_check_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bad.toml").write_text(
        '[[expert]]\nname = "s"\nengine = "server"\nmodel = "m"\nurl = "http://127.0.0.1:9/v1"\n'
        '[[expert]]\nname = "x"\nengine = "vllm"\nmodel = "./none"\n'
    )
    said = run(folder, monkeypatch, "check", "bad.toml", code=1)
    assert "no server answers at http://127.0.0.1:9/v1" in said
    assert "there is no folder ./none" in said
    assert "no, s, x would have to run in transformers" in said


def test_a_pool_is_fused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    write_expert(folder / "r", 5, ends=False)
    text = (folder / "pool.toml").read_text()
    router = '\n[[expert]]\nname = "r"\nengine = "transformers"\nmodel = "r"\nmax_tokens = 6\n'
    (folder / "fusion.toml").write_text(text + router)
    (folder / "short.jsonl").write_text('{"question": "so"}\n{"question": "and so on"}\n{"question": "no"}\n')
    save_file({"router_head": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}, folder / "h.safetensors")
    given = ("fuse", "fusion.toml", "-q", "short.jsonl", "--router", "r", "--head", "h.safetensors", "-a", "f.jsonl")
    said = run(folder, monkeypatch, *given, "--batch", "2")
    assert "18 tokens in 12 steps" in said
    assert "3 answers in f.jsonl, 3 of them new" in said
    kept = Answers(folder / "f.jsonl")
    assert all(one.written == 6 and one.finish == "length" for one in kept.by_key.values())
    assert "0 of them new" in run(folder, monkeypatch, *given)
    assert "has other weights or settings" in run(folder, monkeypatch, *given, "--plan", "xshare(1, warmup=0)", code=2)
    said = run(
        folder,
        monkeypatch,
        "fuse",
        "fusion.toml",
        "-q",
        "short.jsonl",
        "--router",
        "q",
        "--head",
        "h.safetensors",
        code=2,
    )
    assert "no expert 'q' in the pool" in said
    (folder / "r" / "tokenizer.json").write_text((folder / "r" / "tokenizer.json").read_text() + " ")
    said = run(folder, monkeypatch, *given[:-1], "g.jsonl", code=2)
    assert "carpool models fuse: this pool cannot be fused: the experts differ in tokenizer or vocabulary" in said
