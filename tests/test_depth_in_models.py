"""Experts in planes inside a model: what is computed, what is counted, files, the command, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from typer.testing import CliRunner

import carpool
from carpool import Batch, CarpoolError, Outcome, parse
from carpool.artefacts.identity import fingerprint
from carpool.artefacts.statistics import Statistics
from carpool.calibrate.compress import compress, lost
from carpool.cli.commands import app
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS, forward
from carpool.experts.stored import StoredExperts
from carpool.hosts.transformers import find_layers
from carpool.routing.batch import Grouping

DEPTHS = (2, 4, 6)
FAMILIES = ("qwen3_moe", "gpt_oss")  # plain; transposed, with biases and a gate of its own


def statistics(model: Any, method: str = "energy") -> Statistics:
    layers = find_layers(model)
    ids_BT = torch.randint(3, model.config.vocab_size, (20, 64), generator=torch.Generator().manual_seed(3))
    held_B = torch.arange(20) % 4 == 0
    found = compress(model, layers, ids_BT, held_B, depths=DEPTHS, group=16, method=method)  # type: ignore[arg-type]
    return Statistics(
        layers=found, fingerprint=fingerprint((one.index, one.weight_EH) for one in layers), architecture="tiny",
        num_experts=layers[0].num_experts, top_k=layers[0].top_k, hidden_size=32, tokens=ids_BT.numel(), seed=0,
        data=(), created="", carpool_version="", torch_version="",
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def compressed(request: pytest.FixtureRequest) -> tuple[Any, Statistics]:
    model = tiny_model(request.param)
    return model, statistics(model)


def quantised(model: Any, stats: Statistics, depth: int) -> Any:
    """A copy whose experts are the planes' weights at one depth."""
    other = copy.deepcopy(model)
    for layer in find_layers(other):
        stored, held = StoredExperts.of(stats.for_layer(layer.index)), dict(layer.experts.named_parameters())
        for name, planes in (("gate_up_proj", stored.into), ("down_proj", stored.out)):
            weight = planes.read(depth)
            held[name].data.copy_(weight.mT if getattr(layer.experts, "is_transposed", False) else weight)
    return other


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("depth", DEPTHS)
def test_at_one_depth_it_is_the_quantised_model(compressed: tuple[Any, Statistics], depth: int) -> None:
    model, stats = compressed
    ids = tokens(3, 12)
    plan = f"topk(k={model.config.num_experts_per_tok}) | bits({depth})"
    with carpool.share(model, plan, stats=stats, exempt_prefill=False, group="request"):
        found = logits(model, ids)
    torch.testing.assert_close(found, logits(quantised(model, stats, depth), ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits(model, ids), atol=1e-4)


def test_experts_whose_output_nobody_takes_see_one_row(compressed: tuple[Any, Statistics]) -> None:
    model, stats = compressed
    k, experts = model.config.num_experts_per_tok, find_layers(model)[0].experts
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len((*args, *kwargs.values())[0]))

    for plan, first in ((f"topk(k={k}) | bits(2)", 1), (f"topk(k={k})", 15)):
        seen.clear()
        with carpool.share(model, plan, stats=stats, exempt_prefill=False, group="request"):
            handle = experts.register_forward_pre_hook(count, with_kwargs=True)  # after ours
            logits(model, tokens(3, 5))
            handle.remove()
        assert seen[0] == first


def test_prompts_are_stock_bit_for_bit_and_so_is_the_model_afterwards(compressed: tuple[Any, Statistics]) -> None:
    model, stats = compressed
    ids = tokens(2, 10)
    before = logits(model, ids)
    with carpool.share(model, "depth(bytes=0.2)", stats=stats):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


def test_what_is_read_is_counted_at_its_deepest_use(compressed: tuple[Any, Statistics]) -> None:
    model, stats = compressed
    layout = Layout(4, 12, 4, Grouping.parse("batch"))
    ids = tokens(4, 12)
    seen: dict[int, Tensor] = {}

    def observe(layer: int, batch: Batch, outcome: Outcome) -> None:
        seen[layer] = outcome.depth_SE[:-1]  # the last step holds the prompts

    layers = find_layers(model)
    run = forward(model, parse("depth(bytes=0.2)"), ids, layout, num_layers=len(layers), stats=stats, observe=observe)
    for place, layer in enumerate(layers):
        sizes = StoredExperts.of(stats.for_layer(layer.index)).sizes
        read = float(sizes[seen[place]].sum())
        assert float(run.layers_LFM[place, LAYER_FIELDS.index("bytes")]) == pytest.approx(read)
        assert read < float(run.layers_LFM[place, LAYER_FIELDS.index("union")])
        whole = 2 * sum(one[0].numel() for name, one in layer.experts.named_parameters() if not name.endswith("bias"))
        assert float(sizes[4]) == pytest.approx((4 + 16 / 16) / 16, rel=0.05)
        assert StoredExperts.of(stats.for_layer(layer.index)).bytes_read(4) / whole == pytest.approx(float(sizes[4]))


def test_a_run_says_how_much_it_read(compressed: tuple[Any, Statistics]) -> None:
    model, stats = compressed
    k = find_layers(model)[0].top_k
    with carpool.share(model, f"topk(k={k}) | bits(4)", stats=stats, exempt_prefill=False, group="request") as run:
        logits(model, tokens(3, 12))
    found = run.summary()
    assert found.read == found.natively
    assert found.bytes_read is not None
    assert found.bytes_natively is not None
    sizes = StoredExperts.of(stats.for_layer(find_layers(model)[0].index)).sizes
    assert found.bytes_read / found.bytes_natively == pytest.approx(float(sizes[4]))


def test_feedback_beats_rounding_on_text_that_it_did_not_see() -> None:
    model = tiny_model("qwen3_moe")
    fed, rounded = statistics(model), statistics(model, "round")
    for index in fed.layers:
        assert (lost(fed.layers[index])[:2] < lost(rounded.layers[index])[:2]).all()


def test_a_row_is_read_as_its_own_group_reads() -> None:
    """Grouped by request, what a request gets does not depend on who is beside it."""
    model = tiny_model("qwen3_moe")
    stats = statistics(model)
    ids = tokens(3, 8)
    with carpool.share(model, "depth(bytes=0.2)", stats=stats, group="request", exempt_prefill=False):
        together, alone = logits(model, ids), logits(model, ids[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


def test_files_of_another_model_and_missing_planes_are_refused(compressed: tuple[Any, Statistics]) -> None:
    model, stats = compressed
    bare = replace(stats, layers={i: {k: v for k, v in one.items() if not k.startswith(("planes", "depth"))}
                                  | {"similarity_x": torch.ones(8)} for i, one in stats.layers.items()})  # fmt: skip
    ids = tokens(1, 4)
    for plan in ("depth(bytes=0.2)", "topk(k=1) | bits(4)"):
        with pytest.raises(CarpoolError, match="carpool compress"), carpool.share(model, plan, stats=bare):
            logits(model, ids)
    other = tiny_model(model.config.model_type, seed=5)
    with pytest.raises(CarpoolError, match="another model"), carpool.share(other, "topk(k=1) | bits(4)", stats=stats):
        logits(other, ids)


def test_the_command_writes_a_file_that_evaluate_reads(tmp_path: Path) -> None:
    runner, output = CliRunner(), tmp_path / "experts.safetensors"
    made = ["compress", "--tokens", "4096", "--depths", "2,4", "--method", "round", "-o", str(output)]
    result = runner.invoke(app, made)
    assert result.exit_code == 0, result.output
    assert "stored:" in result.output
    assert output.exists()
    assert not list(tmp_path.glob("*.layers"))
    stats = Statistics.load(output)
    assert set(stats.layers) == {0, 1, 2, 3}
    shown = runner.invoke(
        app,
        ["evaluate", "--stats", str(output), "-p", "depth(bytes=0.2)", "-p", "topk(k=8) | bits(4)", "--batch", "4",
         "--batches", "1", "--sequence", "40"],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.calibrate import compress as module

    runner, output = CliRunner(), tmp_path / "experts.safetensors"
    arguments = ["compress", "--tokens", "2048", "--depths", "2", "--method", "round", "-o", str(output)]
    true, calls = module.measure, []

    def counting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*args)

    monkeypatch.setattr(module, "measure", counting)
    runner.invoke(app, arguments)
    assert not output.exists()
    assert len(list((tmp_path / "experts.safetensors.layers").iterdir())) == 2
    calls.extend([0] * 9)
    assert runner.invoke(app, arguments).exit_code == 0
    assert len(calls) == 3 + 9 + 2
    assert output.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--depths", "0,4"], "numbers of bits from 1 to 8"),
        (["--depths", "x"], "numbers of bits"),
        (["--method", "awq"], "use one of energy"),
        (["--group", "1"], "8 to 4096"),
        (["--tokens", "1"], "256"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["compress", *options])
    assert result.exit_code == 2
    assert said in result.output
