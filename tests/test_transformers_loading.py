"""`load_model`: what loads, and the one sentence for everything that does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from carpool import CarpoolError, Grouping, parse
from carpool.calibrate import calibrate
from carpool.evaluate.layout import Layout
from carpool.evaluate.measure import measure
from carpool.evaluate.sequences import Sequences
from carpool.evaluate.study import describe
from carpool.hosts.transformers import find_layers, load_model


def save(folder: Path, model: Any, *, tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "the": 2, "cat": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", tiny_model("qwen3_moe", dtype=torch.bfloat16))


def refusal(path: Any) -> str:
    with pytest.raises(CarpoolError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "no traceback of transformers"
    return message


def test_loads_in_fp32_and_evaluation_mode(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer("the cat")["input_ids"] == [2, 3]
    original = tiny_model("qwen3_moe")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(parameter.bfloat16())
        assert torch.equal(model(tokens()).logits, original(tokens()).logits)
    assert load_model(str(folder), dtype="auto")[0].dtype == torch.bfloat16


def test_none_is_the_reference_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Demo:
        MODEL = folder

    monkeypatch.setitem(sys.modules, "carpool_demo", Demo)
    assert load_model()[0].config.num_experts == 8
    monkeypatch.setitem(sys.modules, "carpool_demo", None)
    assert "carpool[demo]" in refusal(None)


def test_paths_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nowhere")
    assert "there is no folder" in refusal("nowhere")
    assert "there is no folder" in refusal("")
    assert "has no config.json" in refusal(tmp_path)
    assert "is a file" in refusal(folder / "config.json")


def test_broken_folders(folder: Path) -> None:
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    assert "cannot load the weights" in refusal(folder)
    weights.unlink()
    assert "cannot load the weights" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "cannot load the configuration" in refusal(folder)


def test_weights_that_do_not_fit_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    dropped = next(name for name in tensors if "layers.1" in name and "gate.weight" in name)
    del tensors[dropped]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.gate.weight" in refusal(folder)


def test_a_model_without_its_tokenizer(tmp_path: Path) -> None:
    assert "cannot load the tokenizer" in refusal(save(tmp_path, tiny_model("mixtral"), tokenizer=False))


def test_models_without_experts_or_of_unknown_families(tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    said = refusal(save(tmp_path / "dense", dense))
    assert "Qwen3ForCausalLM has no mixture-of-experts layer: it is a dense model" in said
    assert len(said) < 250  # no list of all families
    phimoe = tiny_model("phimoe", num_local_experts=4)
    assert "PhimoeTopKRouter" in refusal(save(tmp_path / "phimoe", phimoe))


VISION = {
    "qwen3_vl_moe": {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "glm4v_moe": {"out_hidden_size": 32, "image_size": 28},
}


@pytest.mark.parametrize("family", VISION)
def test_models_for_images_take_text_alone(tmp_path: Path, family: str) -> None:
    """Loaded, calibrated and measured like any other, though transformers has no causal class of the family."""
    small = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, **VISION[family]}
    text = tiny_config(f"{family}_text").to_dict()
    config = AutoConfig.for_model(family, text_config=text, vision_config=small)
    torch.manual_seed(0)
    save(tmp_path, AutoModelForImageTextToText.from_config(config))
    model, _ = load_model(tmp_path)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    stats = calibrate(model, find_layers(model), tokens(rows=16, length=24))
    assert set(stats.layers) == {0, 1}
    sequences = Sequences(tokens(rows=8, length=10), torch.zeros(8, dtype=torch.int64), ("text",))
    layout = Layout(4, 9, 3, Grouping.parse("batch"))
    stock, shared = measure(model, describe(model), [parse("oea(k0=1)")], sequences, layout, 2)
    assert shared.changed_rows > 0
    assert shared.layers["union"].sum() < stock.layers["union"].sum()


def test_families_that_predict_no_text(tmp_path: Path) -> None:
    tiny_model("openai_privacy_filter").save_pretrained(tmp_path)
    assert "no class of the family openai_privacy_filter that predicts text" in refusal(tmp_path)


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot load the configuration of no-such-organisation/no-such-model" in refusal(
        "no-such-organisation/no-such-model"
    )
