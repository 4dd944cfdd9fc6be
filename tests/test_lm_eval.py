"""lm-evaluation-harness with a policy, on tasks that lie in a folder here and a tiny model; no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from carpool import CarpoolError, parse
from carpool.cli.commands import app
from carpool.evaluate.answers import Question, deal, score
from carpool.routing.batch import Grouping

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_EVALUATE_OFFLINE"] = "1"  # read when the harness is imported
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")

WORDS = ["<pad>", "<unk>", "<eos>", *(f"w{number}" for number in range(3, 64))]
CHOICES = """
task: choices
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["w5 w6", "w7 w8 w9", "w10"]
doc_to_target: 1
"""
WRITING = """
task: writing
dataset_path: json
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "w7"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling
dataset_path: json
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and three tasks on twelve documents."""
    made = tmp_path_factory.mktemp("lm_eval")
    tiny_model("qwen3_moe").save_pretrained(made / "model")
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(made / "model")
    drawn = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 64, (4 + place % 3,), generator=drawn).tolist() for place in range(12)]
    lines = [json.dumps({"question": " ".join(f"w{word}" for word in document)}) for document in documents]
    (made / "documents.jsonl").write_text("\n".join(lines))
    data = f'dataset_kwargs: {{data_files: {{test: "{made}/documents.jsonl"}}, cache_dir: "{made}/cache"}}\n'
    for task in (CHOICES, WRITING, ROLLING):
        (made / f"{task.split()[1]}.yaml").write_text(task + data)
    return made


def run(
    folder: Path, *tasks: str, model: str = "carpool", use_cache: str | None = None, batch_size: int = 4, **given: Any
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import carpool.lm_eval  # noqa: F401 - registers the types

    found = lm_eval.simple_evaluate(
        model=model, model_args={"pretrained": str(folder / "model"), "dtype": "float32", **given}, tasks=list(tasks),
        batch_size=batch_size, device="cpu", bootstrap_iters=0, log_samples=True, use_cache=use_cache,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    return dict(found)


def test_log_likelihoods_are_scored_in_lockstep(folder: Path) -> None:
    found = run(folder, "choices", "rolling", policy="oea(k0=1)")
    facts = found["config"]["carpool"]
    assert (facts["policy"], facts["group"], facts["requests_together"]) == ("oea(k0=1)", "batch", 4)
    assert 0 < facts["changed_rows"] <= facts["rows"]
    assert facts["experts_read"] < facts["experts_natively"]
    assert 0 < facts["displaced_mass"] < 1
    assert facts["expected_loss"] == pytest.approx(facts["displaced_mass"])  # nothing is left to surrogates
    samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
    choices = [("w5", "w6"), ("w7", "w8", "w9"), ("w10",)]
    asked = [
        Question(tuple(map(WORDS.index, sample["doc"]["question"].split())), tuple(map(WORDS.index, choice)))
        for sample in samples
        for choice in choices
    ]
    model, expected = tiny_model("qwen3_moe"), {}
    for places in deal(asked, 4):
        batch = [asked[place] for place in places]
        scored = score(model, parse("oea(k0=1)"), batch, Grouping.parse("batch"), num_layers=2)
        expected = dict(zip(places, scored, strict=True)) | expected
    answers = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
    assert answers == pytest.approx([expected[place][0] for place in range(len(asked))], abs=1e-4)
    json.dumps(facts)


def test_scores_that_depend_on_the_batch_say_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def scored(batch_size: int, **given: Any) -> tuple[list[float], dict[str, Any], str]:
        caplog.clear()
        found = run(folder, "choices", batch_size=batch_size, **given)
        samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
        answers = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
        return answers, found["config"]["carpool"], caplog.text

    from carpool.lm_eval.sums import told

    small, few, said = scored(2, policy="oea(k0=1)")
    large, many, _ = scored(8, policy="oea(k0=1)")
    assert small != pytest.approx(large, abs=1e-4)
    assert [(one["group"], one["requests_together"]) for one in (few, many)] == [("batch", 2), ("batch", 8)]
    assert few["depends"] == (
        "scores depend on the requests that decode together (2, grouped by batch): compare them with results of the "
        "same number and group alone"
    )
    assert few["depends"] in said
    assert told(few) in said, "what the policy did is logged"
    read = f"{few['experts_read']:.1f} of {few['experts_natively']:.1f} experts read a layer and step"
    assert told(few).startswith(f"oea(k0=1), grouped by batch, 2 requests together: {read}")
    for given in ({"policy": "topk(k=1)"}, {"policy": "oea(k0=1)", "group": "request"}):
        small, alone, _ = scored(2, allow_unchanged=True, **given)
        large, _, _ = scored(8, allow_unchanged=True, **given)
        assert small == pytest.approx(large, abs=1e-4)
        assert alone["depends"] == "scores do not depend on the requests that decode together"


def test_a_policy_file_generates(folder: Path, tmp_path: Path) -> None:
    from carpool import PolicyFile

    PolicyFile(parse("xshare(budget=3)"), layers={1: {"budget": 4}}).save(tmp_path / "mine.json")
    found = run(folder, "writing", policy=str(tmp_path / "mine.json"))
    facts = found["config"]["carpool"]
    assert facts["policy"] == "mine.json: xshare(budget=3)"
    assert facts["layers"] == {"1": {"budget": 4}}
    assert 0 < facts["changed_rows"] <= facts["rows"] <= 12 * 3 * 2  # the first new token comes from the prompt
    assert facts["experts_read"] < facts["experts_natively"]
    assert "exact_match,none" in found["results"]["writing"]


def test_a_policy_that_changes_nothing_is_no_result(folder: Path) -> None:
    for task in ("choices", "writing"):
        with pytest.raises(CarpoolError, match=rf"topk\(k=2\) changed no row of the task {task}"):
            run(folder, task, policy="topk(2)")
    same = run(folder, "choices", "rolling", policy="topk(2)", allow_unchanged=True)
    stock = run(folder, "choices", "rolling", model="hf")
    assert same["config"]["carpool"]["changed_rows"] == 0
    assert same["results"]["choices"]["acc,none"] == stock["results"]["choices"]["acc,none"]
    perplexity = [found["results"]["rolling"]["word_perplexity,none"] for found in (same, stock)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)


def test_refused(folder: Path, tmp_path: Path) -> None:
    from carpool.lm_eval.in_transformers import CarpoolLM

    for given, message in [
        ({}, "no policy was given"),
        ({"policy": "oea(k0=1)", "batch_size": "auto"}, "number of requests that decode together"),
        ({"policy": "oea(k0=1)"}, "batch_size=1"),
        ({"policy": "xshare(budget=9)", "batch_size": 4}, "asks for 9 of 8 experts"),
        ({"policy": "oea(k0=1)", "batch_size": 4, "pretrained": str(tmp_path)}, r"has no config\.json"),
    ]:
        with pytest.raises(CarpoolError, match=message):
            CarpoolLM(**{"pretrained": str(folder / "model"), "device": "cpu", **given})
    with pytest.raises(CarpoolError, match="use_cache keeps answers"):
        run(folder, "choices", policy="oea(k0=1)", use_cache=str(tmp_path / "cache"))


def test_vllm_refuses_log_likelihoods() -> None:
    pytest.importorskip("vllm", reason="vLLM is an extra")
    from carpool.lm_eval.in_vllm import CarpoolVLLM

    bare = CarpoolVLLM.__new__(CarpoolVLLM)
    for ask in (bare.loglikelihood, bare.loglikelihood_rolling):
        with pytest.raises(CarpoolError, match="which vLLM routes natively whatever the policy"):
            ask([])
    for given, message in [({}, "no policy"), ({"policy": "oea(k0=1)", "data_parallel_size": 2}, "data parallelism")]:
        with pytest.raises(CarpoolError, match=message):
            CarpoolVLLM("model", **given)


def test_vllm_counts_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that is not there: what is configured, and what becomes of its counters."""
    pytest.importorskip("vllm", reason="vLLM is an extra")
    from lm_eval.models.vllm_causallms import VLLM

    from carpool.lm_eval.in_vllm import CarpoolVLLM

    configured: dict[str, Any] = {}
    layer = {"rows": 10, "rows_exempt": 4, "rows_changed": 3, "steps": 2, "union": 9, "natural_union": 12,
             "displaced_mass": 0.6, "expected_loss": 0.3}  # fmt: skip
    answers = iter([[layer] * 2, [layer] * 2, [layer], [layer | {"rows_changed": 0}]])
    scheduler = SimpleNamespace(max_num_seqs=7)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=scheduler))

    def start(self: Any, pretrained: str, **given: Any) -> None:
        configured.update(given)
        self.model = SimpleNamespace(
            collective_rpc=lambda name, kwargs: [{"layers": next(answers)}] * 2, llm_engine=engine
        )

    monkeypatch.setattr(VLLM, "__init__", start)
    monkeypatch.setattr(VLLM, "generate_until", lambda self, requests, disable_tqdm: ["text"] * len(requests))
    more = {"other": 1, "carpool": {"compile": False}}
    made = CarpoolVLLM("model", policy="oea(k0=1)", stats="s.safetensors", additional_config=more)
    assert configured["additional_config"] == {
        "other": 1,
        "carpool": {
            "policy": "oea(k0=1)", "group": "batch", "isolation": "batch", "compile": False,
            "stats": str(Path("s.safetensors").resolve()),
        },
    }  # fmt: skip
    requests = [SimpleNamespace(task_name="one"), SimpleNamespace(task_name="one")]
    assert made.generate_until(requests) == ["text", "text"]
    facts = made.get_model_info()["carpool"]
    assert (facts["rows"], facts["changed_rows"], facts["experts_read"]) == (12, 6, 4.5)
    assert facts["displaced_mass"] == pytest.approx(0.1)
    assert facts["expected_loss"] == pytest.approx(0.05)
    assert (facts["group"], facts["requests_together"]) == ("batch", 7)
    assert "(7, grouped by batch)" in facts["depends"]
    with pytest.raises(CarpoolError, match="changed no row of the task two"):
        made.generate_until([SimpleNamespace(task_name="two")])


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_generates(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is an extra")
    import vllm_models

    vllm_models.set_environment()
    vllm_models.write_model("qwen3_moe", tmp_path)
    for path in (folder / "model").glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = run(
        folder, "writing", model="carpool-vllm", pretrained=str(tmp_path), policy="oea(k0=1)", enforce_eager=True,
        kv_cache_memory_bytes=1 << 24, max_model_len=64, max_num_batched_tokens=256, max_num_seqs=4, block_size=32,
        additional_config={"carpool": {"compile": False}},
    )  # fmt: skip
    facts = found["config"]["carpool"]
    assert (facts["policy"], facts["group"], facts["requests_together"]) == ("oea(k0=1)", "batch", 4)
    assert 0 < facts["changed_rows"] <= facts["rows"]
    assert facts["experts_read"] < facts["experts_natively"]


@pytest.mark.slow
def test_the_command_line_is_the_harnesss(folder: Path, tmp_path: Path) -> None:
    given = f"pretrained={folder}/model,dtype=float32,policy=xshare(budget=3, warmup=0)"
    arguments = [
        "lm-eval", "run", "--model", "carpool", "--model_args", given, "--tasks", "choices", "--batch_size", "4",
        "--include_path", str(folder), "--output_path", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (written,) = (tmp_path / "out").rglob("results*.json")
    facts = json.loads(written.read_text())["config"]["carpool"]
    assert facts["policy"] == "xshare(budget=3, warmup=0)"
    assert facts["changed_rows"] > 0
    refused = CliRunner().invoke(app, [*arguments[:5], given.replace("budget=3", "budget=99"), *arguments[6:]])
    assert refused.exit_code == 2
    assert "carpool lm-eval: " in refused.output


def test_a_task_that_is_not_there() -> None:
    done = CliRunner().invoke(app, ["lm-eval", "run", "--model", "carpool", "--tasks", "nosuch"])
    assert done.exit_code == 2
    assert "Tasks not found: nosuch" in done.output
    assert "`carpool lm-eval ls tasks` lists them" in " ".join(done.output.split())
    assert "Traceback" not in done.output
