"""Models whose checkpoints are quantised: what transformers makes of them on a CPU, and bytes as they are stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lockstep_tools import noise
from safetensors.torch import load_file, save_file
from test_compressed_checkpoints import logits, made
from test_transformers_loading import refusal, save
from tiny_models import tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import carpool
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.weights import ExpertTensor
from carpool.calibrate import calibrate
from carpool.calibrate.compress import compress
from carpool.calibrate.run import signed
from carpool.cli.commands import app
from carpool.cli.common import model_facts
from carpool.experts.stored import StoredExperts
from carpool.hosts.transformers import find_layers, load_model, open_model
from carpool.hosts.transformers.as_stored import shares_stored
from carpool.plans.policy_file import PolicyFile

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 16


def rewrite(folder: Path, config: dict[str, Any], change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """Put what `change` makes of every expert's matrix in its place."""
    held = load_file(folder / "model.safetensors")
    found: dict[str, Tensor] = {}
    for name, tensor in held.items():
        one = ExpertTensor.of(name)
        found |= {name: tensor} if one is None or one.is_bias else change(name, tensor.float())
    save_file({name: one.contiguous() for name, one in found.items()}, folder / "model.safetensors", {"format": "pt"})
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(read | {"quantization_config": config}))
    return folder


def fp8(folder: Path) -> Path:
    """As DeepSeek-V3 is stored: blocks with a scale."""

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        rows, columns = tensor.shape
        blocks = tensor.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-8) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scale}

    save(folder, tiny_model("qwen3_moe").to(torch.bfloat16))
    kept = [n.removesuffix(".weight") for n in load_file(folder / "model.safetensors") if ExpertTensor.of(n) is None]
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return rewrite(folder, config | {"modules_to_not_convert": kept}, change)


def mxfp4(folder: Path) -> Path:
    """As gpt-oss is stored: 4 bits, and an exponent for 32 inputs."""

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        groups = tensor.mT.unflatten(-1, (-1, 32))
        exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp_min(1e-30))) - 2
        code = ((groups / 2 ** exponent[..., None])[..., None] - FP4).abs().argmin(-1)
        packed = (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}

    save(folder, tiny_model("gpt_oss").to(torch.bfloat16))
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, change)


def int4(folder: Path) -> Path:
    """compressed-tensors, packed."""
    source = save(folder.with_name(f"{folder.name}-source"), tiny_model("qwen3_moe").to(torch.bfloat16))
    made(source, folder, "compressed-tensors", (4,))
    return folder


# what a weight takes of 16 bits, and how far the dequantised weights may be from the source's
FORMATS = {"fp8": (fp8, 0.5 + 4 / BLOCK**2 / 2, 0.04), "mxfp4": (mxfp4, 4.25 / 16, 0.2), "int4": (int4, 5 / 16, 0.2)}


@pytest.fixture(scope="module", params=FORMATS)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    make, _, _ = FORMATS[request.param]
    return request.param, make(tmp_path_factory.mktemp("models") / request.param)


def test_it_is_the_model_that_it_was_made_from_nearly(quantised: tuple[str, Path]) -> None:
    name, folder = quantised
    assert open_model(folder).quantised
    model, _ = load_model(folder)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    source = {key: one.detach() for key, one in tiny_model(model.config.model_type).named_parameters()}
    for key, parameter in model.named_parameters():
        far = float((parameter.detach() - source[key]).norm() / source[key].norm().clamp_min(1e-9))
        assert far < (FORMATS[name][2] if "experts" in key else 0.01), key


def test_bytes_are_counted_as_stored(quantised: tuple[str, Path]) -> None:
    """Of planes over what stock reads, of a plan that shares, and in the facts that results hold."""
    name, folder = quantised
    model, _ = load_model(folder)
    layers = find_layers(model)
    share = shares_stored(model, layers)[0]
    assert FORMATS[name][1] <= share < FORMATS[name][1] + 0.04  # biases of gpt-oss, shapes of compressed-tensors
    ids_BT = torch.randint(3, 60, (20, 32), generator=torch.Generator().manual_seed(3))
    found = compress(model, layers, ids_BT, torch.arange(20) % 4 == 0, depths=(2,), group=16, method="round")
    stats = signed(model, layers, found, hidden_size=32, tokens=ids_BT.numel(), seed=0, data=[])
    plan = f"topk(k={layers[0].top_k}) | bits(2)"
    with carpool.share(model, plan, stats=stats, exempt_prefill=False, group="request") as run:
        logits(model, tokens(2, 9))
    summary = run.summary()
    assert summary.bytes_read is not None
    assert summary.bytes_natively is not None
    size = float(StoredExperts.of(stats.for_layer(layers[0].index)).sizes[2])
    assert summary.bytes_read / summary.bytes_natively == pytest.approx(size / share)
    whole = sum(parameter.numel() for parameter in layers[0].experts.parameters()) / layers[0].num_experts
    assert model_facts(model, str(folder))["expert_bytes"] == pytest.approx(2 * whole * share)


def test_it_can_be_calibrated_and_its_statistics_are_its_own(quantised: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = quantised
    model, _ = load_model(folder)
    ids_BT = torch.randint(3, 60, (20, 32), generator=torch.Generator().manual_seed(3))
    calibrate(model, find_layers(model), ids_BT).save(tmp_path / "stats.safetensors")
    stats = Statistics.load(tmp_path / "stats.safetensors")
    again, _ = load_model(folder)
    with carpool.share(again, "sere(top=1, threshold=0.0)", stats=stats, exempt_prefill=False) as run:
        logits(again, tokens(1, 4))
    assert run.changed_rows()
    source = tiny_model(model.config.model_type)
    with pytest.raises(carpool.CarpoolError, match="another model"), carpool.share(source, "sere(top=1)", stats=stats):
        logits(source, tokens(1, 4))


@pytest.mark.parametrize(("method", "said"), [("nobodys", "does not know"), ("awq", "cannot load the weights")])
def test_what_transformers_cannot_load_is_one_sentence(method: str, said: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tiny_model("qwen3_moe"))
    config = json.loads((folder / "config.json").read_text())
    given = {"quant_method": method, "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": given}))
    message = refusal(folder)
    assert said in message
    assert str(folder) in message


def test_commands_take_it(quantised: tuple[str, Path], tmp_path: Path) -> None:
    """From text to planes, an evaluation with them and a policy file, as a user would."""
    _, source = quantised
    folder = shutil.copytree(source, tmp_path / "model")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="1").save_pretrained(folder)
    text, planes, result, policy = (tmp_path / name for name in ("a.jsonl", "e.safetensors", "r.json", "policy.json"))
    text.write_text("".join(json.dumps({"text": noise("a", 60, seed).text}) + "\n" for seed in range(24)))
    short = ["--batch", "2", "--sequence", "8", "--prefill", "4", "--stats", planes]
    depth = ["--policy", "depth(bytes=0.2)"]
    for name, given in {
        "compress": ["--method", "round", "--group", 16, "--depths", "2,3", "--sequence", 16, "-o", planes],
        "evaluate": [*short, *depth, "--policy", "topk(k=2) | bits(2)", "--batches", 10, "--json", result],
        "tune": [*short, "--max-kl", 1, "--also-batch", "1", "--tokens", 80, "-o", policy],
    }.items():
        done = CliRunner().invoke(app, [name, str(folder), "--text", str(text), *map(str, given)])
        assert done.exit_code == 0, done.output
    assert PolicyFile.load(policy).model["num_experts"] == 8
    deep, alone = json.loads(result.read_text())["results"][1:]
    assert 0 < deep["bytes_share"]["value"] < alone["bytes_share"]["value"] * 2
