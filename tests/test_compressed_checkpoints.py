"""Checkpoints of `carpool compress`: what they hold, who loads them, what is refused, and that none is half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_transformers_loading import save, save_tokenizer
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import carpool
from carpool import CarpoolError
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.weights import ExpertTensor, Weights
from carpool.calibrate.compress import compress
from carpool.calibrate.run import signed
from carpool.cli.commands import app
from carpool.cli.compress_output import Output
from carpool.experts.stored import StoredExperts
from carpool.hosts.transformers import find_layers, load_model, open_model
from carpool.hosts.transformers.as_stored import shares_stored

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")  # an expert a tensor under two names; all in one, transposed


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


def made(source: Path, target: Path, form: str, depths: tuple[int, ...], group: int = 16) -> Statistics:
    """What the command does, with text that any model has."""
    bits = None if form == "planes" else depths[-1]
    output, opened = Output.of(target, form, bits), open_model(source)
    output.check(opened, group)
    model = opened.weights()
    ids_BT = torch.randint(3, 60, (20, 32), generator=torch.Generator().manual_seed(3))
    layers = find_layers(model)
    found = compress(
        model,
        layers,
        ids_BT,
        torch.arange(20) % 4 == 0,
        depths=depths,
        group=group,
        method="gptq",
        centre=output.centre,
    )
    stats = signed(
        model, layers, found, hidden_size=model.config.hidden_size, tokens=ids_BT.numel(), seed=0, data=[("a", "b")]
    )
    output.write(opened, model, stats, "gptq", {"depths": list(depths)})
    return stats


def expected(model: Any, stats: Statistics) -> Any:
    """The same model with its experts' weights as they are read at the deepest depth."""
    for layer in find_layers(model):
        stored = StoredExperts.of(stats.for_layer(layer.index))
        for name, weight in stored.weights(layer.experts, stored.depths[-1]).items():
            layer.experts.get_parameter(name).data.copy_(weight)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save(folder, tiny_model(request.param).to(torch.bfloat16))


def test_planes_load_as_the_deepest_depth(source: Path, tmp_path: Path) -> None:
    stats = made(source, tmp_path / "made", "planes", (2, 4))
    model, tokenizer = load_model(tmp_path / "made")
    assert tokenizer("the cat")["input_ids"]
    wanted = expected(load_model(source)[0], stats)
    torch.testing.assert_close(logits(model, tokens(2, 9)), logits(wanted, tokens(2, 9)), rtol=1e-4, atol=1e-4)
    usual = open_model(tmp_path / "made").weights(usual=True)
    assert torch.equal(logits(usual, tokens(2, 9)), logits(wanted, tokens(2, 9)))
    layers = find_layers(model)
    sizes = StoredExperts.of(stats.for_layer(layers[0].index)).sizes
    assert shares_stored(model, layers) == [float(sizes[4])] * len(layers)
    with carpool.share(model, f"topk(k={layers[0].top_k}) | bits(2)", exempt_prefill=False, group="request") as run:
        logits(model, tokens(2, 9))
    found = run.summary()
    assert found.bytes_read is not None
    assert found.bytes_natively is not None
    assert found.bytes_read / found.bytes_natively == pytest.approx(float(sizes[2] / sizes[4]))
    assert not list(tmp_path.glob(".*"))


def test_stock_transformers_refuses_planes_and_does_not_make_experts_up(source: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "made", "planes", (2,))
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "made")


@pytest.mark.parametrize(("form", "bits"), [("rounded", 3), ("compressed-tensors", 4), ("compressed-tensors", 8)])
def test_stock_transformers_loads_the_others(source: Path, tmp_path: Path, form: str, bits: int) -> None:
    target = tmp_path / "made"
    if form == "compressed-tensors" and "gpt_oss" in str(source):
        with pytest.raises(CarpoolError, match="all experts in one tensor"):
            made(source, target, form, (bits,))
        assert list(tmp_path.iterdir()) == []
        return
    stats = made(source, target, form, (bits,))
    stock = AutoModelForCausalLM.from_pretrained(target).eval()
    wanted = dict(expected(load_model(source)[0], stats).named_parameters())
    assert logits(stock, tokens(2, 9)).isfinite().all()
    for name, parameter in stock.named_parameters():
        close = 2**-7 if "experts" in name else 0  # weights or scales are written in the source's bf16
        torch.testing.assert_close(parameter.float(), wanted[name], rtol=close, atol=0)
    ours = load_model(target)[0]
    assert {one.dtype for one in ours.parameters()} == {torch.float32}
    held = dict(stock.named_parameters())
    assert all(torch.equal(parameter, held[name].float()) for name, parameter in ours.named_parameters())
    shares = shares_stored(ours, find_layers(ours))
    recipe = json.loads((target / "recipe.json").read_text())
    assert recipe["parameters"]["format"] == form
    assert recipe["errors"]["lost_energy"][str(bits)]
    if form == "rounded":
        assert recipe["sizes"]["stored"] == 1
        assert shares == [1.0] * len(shares)
    else:  # codes, a scale of 16 bits for 16 weights, and a shape
        assert all(bits / 16 + 1 / 16 < share < bits / 16 + 1 / 16 + 0.04 for share in shares)
        assert recipe["sizes"]["stored"] == pytest.approx(shares[0])


def test_what_is_not_an_expert_is_copied_bit_for_bit(source: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "made", "planes", (2,))
    (path,) = (tmp_path / "made").glob("*.safetensors")
    with safe_open(path, "pt") as after, safe_open(source / "model.safetensors", "pt") as before:
        kept = [name for name in before.keys() if (one := ExpertTensor.of(name)) is None or one.is_bias]  # noqa: SIM118
        assert sorted(after.keys()) == sorted(kept)
        assert all(torch.equal(after.get_tensor(name), before.get_tensor(name)) for name in kept)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.experts.12.up_proj.weight", (3, 12, "up_proj", "weight")),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight_scale", (3, 1, "w2", "weight_scale")),
        ("model.layers.10.mlp.experts.gate_up_proj_blocks", (10, None, "gate_up_proj_blocks", "")),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", None),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", None),
        ("model.layers.3.mlp.gate.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_experts_are_told_by_their_names(name: str, found: tuple[Any, ...] | None) -> None:
    one = ExpertTensor.of(name)
    assert (None if one is None else (one.layer, one.expert, one.part, one.kind)) == found


def test_shards_stay_shards(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(source, tiny_model("qwen3_moe").to(torch.bfloat16))
    (source / "model.safetensors").unlink()
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    assert len(Weights.of(source).files) > 1
    stats = made(source, tmp_path / "made", "planes", (3,))
    wanted = expected(load_model(source)[0], stats)
    usual = open_model(tmp_path / "made").weights(usual=True)
    assert torch.equal(logits(usual, tokens(1, 6)), logits(wanted, tokens(1, 6)))


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from safetensors import torch as written

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(written, "save_file", full)
    with pytest.raises(CarpoolError, match="No space left"):
        made(source, tmp_path / "made", "planes", (2,))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_refused(source: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "made", "planes", (2,))
    planes = tmp_path / "made/experts.planes"
    content = planes.read_bytes()
    planes.unlink()
    with pytest.raises(CarpoolError, match="without its experts"):
        load_model(tmp_path / "made")
    planes.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CarpoolError, match="damaged"):
        load_model(tmp_path / "made")


def test_planes_of_another_model_are_refused(tmp_path: Path) -> None:
    one, two = (save(tmp_path / name, tiny_model("qwen3_moe", seed=seed)) for seed, name in enumerate("ab"))
    made(one, tmp_path / "one", "planes", (2,))
    made(two, tmp_path / "two", "planes", (2,))
    (tmp_path / "one/experts.planes").write_bytes((tmp_path / "two/experts.planes").read_bytes())
    with pytest.raises(CarpoolError, match="another model"):
        load_model(tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "x.safetensors", "--bits", "4"], "name a folder"),
        (["-o", "x", "--format", "gguf"], "use one of planes"),
        (["-o", "x", "--format", "planes", "--bits", "4"], "--depths, not --bits"),
        (["-o", "x", "--format", "rounded"], "takes --bits"),
        (["-o", "x", "--format", "compressed-tensors", "--bits", "3"], "engines read 4 and 8"),
        (["-o", "x", "--bits", "9"], "give 1 to 8"),
        (["-o", "x", "--bits", "4", "--group", "48"], "does not divide"),
        (["-o", "."], "not empty"),
        (["-o", "x", "--method", "reap", "--keep", "32", "--bits", "4"], "leave out --bits"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    result = CliRunner().invoke(app, ["compress", *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", tiny_model("qwen3_moe"))
    made(source, tmp_path / "made", "planes", (2,))
    with pytest.raises(CarpoolError, match="quantised already"):
        made(tmp_path / "made", tmp_path / "again", "planes", (2,))


def test_the_command_writes_a_checkpoint_that_evaluate_reads(tmp_path: Path) -> None:
    runner, target = CliRunner(), tmp_path / "made"
    arguments = [
        "compress",
        "--tokens",
        "512",
        "--sequence",
        "32",
        "--depths",
        "2,4",
        "--method",
        "round",
        "-o",
        str(target),
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    recipe = json.loads((target / "recipe.json").read_text())
    assert recipe["sizes"]["read"].keys() == {"2", "4"}
    shown = runner.invoke(
        app,
        ["evaluate", str(target), "-p", "depth(bytes=0.2)", "--batch", "4", "--batches", "1", "--sequence", "40"],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    again = runner.invoke(app, arguments)
    assert again.exit_code == 2
    assert "not empty" in " ".join(again.output.split())


@pytest.mark.slow
@pytest.mark.vllm
def test_what_vllm_does_with_each(tmp_path: Path) -> None:
    """Rounded weights and planes it runs, and predicts what transformers does."""
    pytest.importorskip("vllm", reason="vLLM is an extra")
    import vllm_models as tiny

    source = tiny.write_model("qwen3_moe", tmp_path / "source")
    save_tokenizer(source)
    given = tiny.prompts(2)
    for form in ("rounded", "planes"):
        made(source, tmp_path / form, form, (4,))
        model, _ = load_model(str(tmp_path / form))
        answers = tiny.generate(tiny.engine(tmp_path / form, None), given)
        for prompt, (ids, chosen) in zip(given, answers, strict=True):
            log_p = logits(model, torch.tensor([prompt + ids]))[0].log_softmax(-1)
            own = [float(log_p[len(prompt) + step - 1, token]) for step, token in enumerate(ids)]
            assert own == pytest.approx(chosen, abs=2e-3)
