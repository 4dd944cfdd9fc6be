"""Checkpoints with fewer experts: what stock transformers and vLLM load, which experts each method keeps, refusals."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from carpool import CarpoolError, RouteSpec
from carpool.calibrate.capture import Seen
from carpool.calibrate.pruning import Naee, best, errors, kept
from carpool.cli.commands import app
from carpool.experts.pruned import pruned, require_prunable
from carpool.hosts.transformers import find_layers

KEPT = {0: torch.tensor([1, 2, 3, 5, 7]), 1: torch.tensor([0, 1, 4, 6, 7]), 2: torch.tensor([0, 2, 3, 4, 6])}
GROUPED = ("deepseek_v3", "glm4_moe")
IDS_BT = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def saved(model: Any, folder: Path, some: dict[int, Tensor] = KEPT) -> Any:
    """The pruned model as stock transformers loads it."""
    from transformers import AutoModelForCausalLM

    layers = find_layers(model)
    require_prunable(layers, len(some[0]), model.config)
    with pruned(layers, {layer.index: some[layer.index] for layer in layers}, model.config):
        model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return loaded.eval()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(GROUPED)))
def test_kept_experts_are_the_sources_and_nothing_else_differs(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = saved(model, tmp_path / "made")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the source changed"
    assert find_layers(model)[0].num_experts == 8
    seen = 0
    for name, tensor in made.state_dict().items():
        source = before[name]
        if tensor.shape != source.shape:
            index = int(name.split(".layers.")[1].split(".")[0])
            place = 0 if source.shape[0] == 8 else source.dim() - 1
            source, seen = source.index_select(place, KEPT[index]), seen + 1
        assert torch.equal(tensor, source), name
    assert seen >= 3 * len(find_layers(made))  # router, gate and up, down
    assert {layer.num_experts for layer in find_layers(made)} == {5}


@pytest.mark.parametrize(("family", "bias"), [("gpt_oss", "bias"), ("minimax_m2", "e_score_correction_bias")])
def test_it_predicts_what_the_source_does_without_the_others(family: str, bias: str, tmp_path: Path) -> None:
    """A router with a bias can be told to choose none of the removed experts."""
    model = tiny_model(family)
    made = saved(model, tmp_path / "made")
    with torch.inference_mode():
        whole = model(input_ids=IDS_BT).logits
        for layer in find_layers(model):
            held = dict(layer.router.named_parameters()) | dict(layer.block.named_buffers())
            held |= dict(layer.router.named_buffers())
            gone_E = torch.ones(8, dtype=torch.bool).index_fill(0, KEPT[layer.index], False)
            held[bias].masked_fill_(gone_E, -1e9)
        expected, found = model(input_ids=IDS_BT).logits, made(input_ids=IDS_BT).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_what_cannot_be_pruned() -> None:
    for family in GROUPED:
        model = tiny_model(family)
        with pytest.raises(CarpoolError, match="groups of experts"):
            require_prunable(find_layers(model), 4, model.config)
    model = tiny_model("mixtral")
    for keep in (1, 8):
        with pytest.raises(CarpoolError, match="keep 2 to 7"):
            require_prunable(find_layers(model), keep, model.config)


def seen_layer(seed: int, N: int = 30, E: int = 5, H: int = 4) -> tuple[Seen, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(N, E, generator=generator) * 2
    outputs_NEH = torch.randn(N, E, H, generator=generator) * torch.rand(E, 1, generator=generator).exp()
    native = RouteSpec(top_k=2).native(logits_NE)
    domain_N = torch.zeros(N, dtype=torch.int64)
    return Seen(
        logits_NE, outputs_NEH, native.ids_NK.long(), native.weights_NK, None, domain_N, domain_N > 0
    ), logits_NE


@pytest.mark.parametrize("seed", range(5))
def test_naee_keeps_the_best_of_all_sets(seed: int) -> None:
    seen, logits_NE = seen_layer(seed)

    def output(row: int, some: tuple[int, ...]) -> list[float]:
        chosen = sorted(some, key=lambda e: -float(logits_NE[row, e]))[:2]
        powers = [math.exp(float(logits_NE[row, e])) for e in chosen]
        shares = [one / sum(powers) for one in powers]
        return [
            sum(w * float(seen.outputs_NEH[row, e, h]) for w, e in zip(shares, chosen, strict=True)) for h in range(4)
        ]

    lost = {}
    for some in itertools.combinations(range(5), 3):
        pairs = [(output(row, tuple(range(5))), output(row, some)) for row in range(len(logits_NE))]
        lost[some] = sum((a - b) ** 2 for whole, left in pairs for a, b in zip(whole, left, strict=True))
    found = Naee(RouteSpec(top_k=2), lambda hidden_NH: hidden_NH, 5, 3)
    for part in zip(*(one.split([11, 19]) for one in seen if one is not None), strict=True):
        found.update(Seen(*part[:4], None, *part[4:]))
    for place, some in enumerate(found.sets):
        assert float(found.lost_S[place]) == pytest.approx(lost[some], rel=1e-5)
    (chosen_P,) = kept({0: found.result()}, "naee", 3).values()
    assert tuple(chosen_P.tolist()) == min(lost, key=lambda some: lost[some])


def test_kept_are_the_best_scored() -> None:
    scores_E = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2])
    assert best(scores_E, 3).tolist() == [1, 2, 3]
    assert kept({4: {"reap": scores_E}}, "reap", 2)[4].tolist() == [1, 3]
    with pytest.raises(CarpoolError, match="no residual stream"):
        kept({4: {"reap": scores_E}}, "easy-ep", 2)
    with pytest.raises(CarpoolError, match=r"12,870 of them.*use reap"):
        Naee(RouteSpec(top_k=2), lambda hidden_NH: hidden_NH, 16, 8)


def test_errors_are_those_of_the_next_token() -> None:
    one, other = tiny_model("mixtral"), tiny_model("mixtral", seed=3)
    found = errors(one, other, IDS_BT)
    kl, nats, count = 0.0, 0.0, 0
    with torch.inference_mode():
        p, q = (model(input_ids=IDS_BT).logits.double().log_softmax(-1) for model in (one, other))
    for row in range(2):
        for place in range(12, 23):
            kl += float((p[row, place].exp() * (p[row, place] - q[row, place])).sum())
            nats -= float(q[row, place, IDS_BT[row, place + 1]])
            count += 1
    assert found["tokens"] == count
    assert found["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert errors(one, one, IDS_BT)["kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.slow
def test_the_command_writes_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tmp_path / "made"
    arguments = [
        "compress",
        "--method",
        "reap",
        "--keep",
        "48",
        "--tokens",
        "2048",
        "--sequence",
        "64",
        "-o",
        str(made),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    recipe = json.loads((made / "recipe.json").read_text())
    assert (recipe["method"], recipe["parameters"]["keep"], recipe["parameters"]["of"]) == ("reap", 48, 64)
    assert 0 < recipe["errors"]["kl"] < 1
    assert recipe["errors"]["perplexity"] > recipe["errors"]["perplexity_of_source"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert len(tokenizer("def f(x):")["input_ids"]) > 1
    assert [layer.num_experts for layer in find_layers(model)] == [48] * 4
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert json.loads((made / "recipe.json").read_text()) == recipe


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "reap"], "say with --keep how many of 64"),
        (["--method", "easy-ep", "--keep", "4"], "keep 8 to 63"),
        (["--method", "naee", "--keep", "32"], "2e\\+18 of them"),
        (["--keep", "4"], "remove experts"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compress", *options, "-o", str(tmp_path / "made")])
    assert result.exit_code == 2
    assert said.replace("\\", "") in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_loads_it_unchanged(tmp_path: Path) -> None:
    """And predicts what transformers does."""
    pytest.importorskip("vllm", reason="vLLM is an extra")
    import vllm_models as tiny
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(tiny.write_model("qwen3_moe", tmp_path / "source")).eval()
    some = {layer.index: torch.arange(1, layer.num_experts, 2) for layer in find_layers(source)}
    made = saved(source, tmp_path / "made", some)
    llm = tiny.engine(tmp_path / "made", None)
    given = tiny.prompts(2)
    for prompt, (ids, chosen) in zip(given, tiny.generate(llm, given, tokens=4), strict=True):
        with torch.inference_mode():
            log_p = made(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        own = [float(log_p[len(prompt) + step - 1, token]) for step, token in enumerate(ids)]
        assert own == pytest.approx(chosen, abs=2e-3)
