"""Statistics that come with a model are found by what the model is, however it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import carpool
from carpool import CarpoolError
from carpool.artefacts.shipped import shipped_for, shipped_with
from carpool.cli.commands import app
from carpool.hosts.transformers import find_layers, identity, load_model

demo = pytest.importorskip("carpool_demo", reason="the reference model is an extra")
FEW = ["--batch", "4", "--batches", "1", "--sequence", "24", "--prefill", "16"]


@pytest.fixture(scope="module")
def model():
    return load_model()[0]


def test_by_the_models_object(model) -> None:
    ids = torch.randint(5, 500, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), carpool.share(model, "sere(top=1)", exempt_prefill=False) as run:
        model(ids, use_cache=False)
    assert run.changed_rows() > 0


def test_another_models_are_none(model) -> None:
    layers = find_layers(model)
    first = layers[0]
    assert shipped_for([layer.index for layer in layers], first.num_experts, first.top_k) is not None
    assert shipped_for([layer.index for layer in layers], first.num_experts, first.top_k - 1) is None
    assert shipped_with(identity(layers)) is not None
    with torch.no_grad():
        kept = first.weight_EH.clone()
        first.weight_EH.neg_()
        assert shipped_with(identity(layers)) is None
        with pytest.raises(CarpoolError, match="needs the statistic"), carpool.share(model, "sere(top=1)"):
            pass
        first.weight_EH.copy_(kept)
    assert shipped_with(identity(layers)) is not None


def test_by_a_path_as_by_default(tmp_path: Path) -> None:
    """Also of a copy of the model under a name of one's own."""
    copy = tmp_path / "mine"
    shutil.copytree(demo.MODEL, copy)
    found = []
    for where in ([], [str(copy)]):
        out = tmp_path / "out.json"
        done = CliRunner().invoke(app, ["evaluate", *where, "-p", "sere(top=1)", *FEW, "--json", str(out)])
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text())["results"][1]["kl"]["value"])
    assert found[0] == found[1] > 0


def test_by_a_path_in_lm_eval(model) -> None:
    pytest.importorskip("lm_eval", reason="an extra")
    from carpool.lm_eval.in_transformers import CarpoolLM

    lm = CarpoolLM(str(demo.MODEL), policy="sere(top=1)", batch_size=2, device="cpu")
    questions = [((None, None), [5, 6, 7, 8 + n], [9, 10, 11]) for n in range(2)]
    assert len(lm._loglikelihood_tokens(questions, disable_tqdm=True)) == 2
    assert lm.sums.totals()["changed_rows"] > 0


def test_it_has_a_chat_template() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    talk = [{"role": "user", "content": "def add(a, b):"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == "def add(a, b):\n"
