"""Calibration of real (tiny) models: families, chunks, precision, refusals, and the command."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tokens
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.calibrate import calibrate, run, token_sequences
from carpool.calibrate.capture import Experts, capture
from carpool.calibrate.sensitivity import sensitivity
from carpool.cli.app import app
from carpool.hosts.transformers import find_layers, fingerprint
from carpool.stats import SIMILARITIES, Statistics
from carpool.texts import Document

IDS_BT = tokens(rows=16, length=24)


class Words:
    """A tokenizer of words: the length of a word is its id."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + len(word) % 60 for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def rows_of_two_experts(model, ids_BT, experts):
    """Per layer `(outputs [2, N, H], ids, weights)` in fp64; outputs a row at a time from the model's own experts."""
    seen, layers = [], find_layers(model)
    hooks = [layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args)) for layer in layers]
    with torch.no_grad():
        model(ids_BT)
        for hook in hooks:
            hook.remove()
        for layer, (hidden_NH, ids_NK, weights_NK) in zip(layers, seen, strict=True):
            outputs = [
                torch.cat([layer.experts(row, torch.tensor([[e]]), torch.ones(1, 1)) for row in hidden_NH.split(1)])
                for e in experts
            ]
            yield torch.stack(outputs).double(), ids_NK, weights_NK.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_experts_run_row_by_row(family):
    model = tiny_model(family)
    stats = calibrate(model, find_layers(model), IDS_BT)
    stats.check(fingerprint(model), [layer.index for layer in find_layers(model)], 8)
    u, v = 5, 2
    for index, (outputs_2NH, ids_NK, weights_NK) in zip(
        stats.layers, rows_of_two_experts(model, IDS_BT, (u, v)), strict=True
    ):
        found = stats.for_layer(index)
        assert found["coverage"].tolist() == [int((ids_NK == e).any(1).sum()) for e in range(8)]
        weight_N = (weights_NK * (ids_NK == u)).sum(1)
        error = (weight_N**2 * (outputs_2NH[1] - outputs_2NH[0]).square().sum(1)).sum()
        routed = 1 - error / (weight_N**2 * outputs_2NH[0].square().sum(1)).sum()
        assert found["similarity_routed"][u, v].item() == pytest.approx(routed.item(), rel=1e-4)
        cosine = torch.cosine_similarity(outputs_2NH[0], outputs_2NH[1], dim=1).mean()
        assert found["similarity_cosine"][u, v].item() == pytest.approx(cosine.item(), abs=1e-5)


def test_chunks_and_batches_do_not_matter(monkeypatch):
    model = tiny_model("qwen3_moe")
    told = []
    whole = calibrate(model, find_layers(model), IDS_BT, seed=1, progress=told.append)
    assert told == [IDS_BT.numel()]
    monkeypatch.setattr(run, "BATCH_TOKENS", 100)
    monkeypatch.setattr(run, "CHUNK_NUMBERS", 7 * 8 * 32)
    told.clear()
    parts = calibrate(model, find_layers(model), IDS_BT, seed=1, progress=told.append)
    assert told == [96, 192, 288, 384]
    for index, tensors in whole.layers.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(parts.layers[index][name], tensor, atol=2e-5, rtol=2e-5)
    assert parts.tokens == whole.tokens == 384


def test_seed_draws_the_sample_for_cka(monkeypatch):
    model = tiny_model("qwen3_moe")
    monkeypatch.setattr(run, "CKA_TOKENS", 32)
    one, same, other = (calibrate(model, find_layers(model), IDS_BT, seed=seed).layers[0] for seed in (0, 0, 1))
    assert torch.equal(one["similarity_cka"], same["similarity_cka"])
    assert not torch.equal(one["similarity_cka"], other["similarity_cka"])
    assert torch.equal(one["similarity_cosine"], other["similarity_cosine"])


def test_experts_of_a_bf16_model_run_in_fp32():
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    layer = find_layers(model)[0]
    experts = Experts(layer)
    hidden_NH = torch.randn(5, 32)
    with experts.ready() as call, torch.no_grad():
        outputs = list(experts.each(call, hidden_NH))
        exact = list(Experts(find_layers(model.float())[0]).each(layer.experts, hidden_NH))
    assert outputs[3].dtype == torch.float32
    torch.testing.assert_close(outputs, exact)


def test_the_model_is_left_as_it_was():
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("batched_mm")
    before = model(IDS_BT).logits
    calibrate(model.train(), find_layers(model), IDS_BT)
    assert model.training
    assert model.config._experts_implementation == "batched_mm"
    assert not any(layer.experts._forward_pre_hooks for layer in find_layers(model))
    assert torch.equal(model.eval()(IDS_BT).logits, before)


def poisoned():
    model = tiny_model("qwen3_moe")
    find_layers(model)[1].experts.down_proj.data[5] = float("nan")
    return model


def nonlinear():
    model = tiny_model("qwen3_moe")
    experts = find_layers(model)[1].experts
    plain = experts.forward
    experts.forward = lambda hidden, ids, weights: plain(hidden, ids, weights.square())
    return model


def bypassed():
    model = tiny_model("qwen3_moe")
    block = find_layers(model)[1].block
    block.forward = lambda hidden: hidden
    return model


def quantised():
    model = tiny_model("qwen3_moe")
    experts = find_layers(model)[0].experts
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (poisoned, "layer 1: expert 5 gives NaN or inf"),
        (nonlinear, "does not mix experts by a weighted sum"),
        (bypassed, r"choices of shape \[\], not once"),
        (quantised, "stored as torch.float8_e4m3fn"),
    ],
)
def test_models_that_cannot_be_measured_are_refused(make, message):
    model = make()
    with pytest.raises(CarpoolError, match=message):
        calibrate(model, find_layers(model), IDS_BT)
    assert not any(layer.experts._forward_pre_hooks for layer in find_layers(model))


def test_bad_sequences_and_layers_are_refused():
    model = tiny_model("qwen3_moe")
    layers = find_layers(model)
    for sequences_BT, message in [
        (IDS_BT + 60, "outside the model's vocabulary of 64"),
        (IDS_BT.repeat(1, 10), "240 tokens exceed the model's 128"),
        (IDS_BT[:2], "48 tokens; at least 256"),
    ]:
        with pytest.raises(CarpoolError, match=message):
            calibrate(model, layers, sequences_BT)
    with pytest.raises(CarpoolError, match="no MoE layer"):
        calibrate(model, [], IDS_BT)
    other = find_layers(tiny_model("qwen3_moe", num_experts=4))
    with pytest.raises(CarpoolError, match=r"\(4, 2\), \(8, 2\)"):
        calibrate(model, [layers[0], other[1]], IDS_BT)


def words(count, length):
    return " ".join(["x" * length] * count)


def test_sequences_are_full_and_shared_between_domains():
    documents = [Document("a", words(2000, 4)), Document("b", words(20, 5)), Document("b", words(150, 5))]
    sequences_BT, domains = token_sequences(documents, Words(), tokens=400, sequence=40, seed=0)
    assert sequences_BT.shape == (10, 40)
    assert (sequences_BT[:, 0] == 1).all()  # each begins as the model's inputs do
    assert not (sequences_BT[:, 1:] == 1).any()
    from_b = (sequences_BT == 3 + 5).any(1)
    assert int(from_b.sum()) == 4  # all that b has to give; the rest comes from a
    assert [domain == "b" for domain in domains] == from_b.tolist()
    assert torch.equal(sequences_BT, token_sequences(documents, Words(), 400, 40, seed=0).ids_BT)


def test_too_little_text_is_refused():
    with pytest.raises(CarpoolError, match="gives 2 full sequences of 40 tokens"):
        token_sequences([Document("a", words(100, 4))], Words(), tokens=400, sequence=40, seed=0)
    with pytest.raises(CarpoolError, match="100 tokens are too few"):
        token_sequences([], Words(), tokens=100, sequence=40, seed=0)
    with pytest.raises(CarpoolError, match="4 tokens is too short"):
        token_sequences([], Words(), tokens=400, sequence=4, seed=0)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `carpool calibrate` on a tiny model in a folder with a text; gives exit code and all output in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join("x" * (i * i % 50) for i in range(4000)))
    model = tiny_model("qwen3_moe")
    monkeypatch.setattr("carpool.hosts.transformers.load_model", lambda path: (model, Words()))

    def call(*arguments):
        result = CliRunner().invoke(app, ["calibrate", *arguments])
        return result.exit_code, " ".join(result.output.split())

    return call


def test_command_writes_checked_statistics(command, tmp_path):
    line = json.dumps({"text": words(3000, 7), "source": "any"})
    (tmp_path / "more.jsonl").write_text(line + "\n\n")
    arguments = ("--text", "text.txt", "--text", "more.jsonl", "--tokens", "500", "--sequence", "50", "--seed", "4")
    code, output = command("some/model", *arguments, "-o", "out.safetensors")
    assert code == 0, output
    assert "over 500 tokens" in output
    assert "wrote out.safetensors" in output
    stats = Statistics.load("out.safetensors")
    assert (stats.tokens, stats.seed, stats.architecture) == (500, 4, "Qwen3MoeForCausalLM")
    assert [name for name, _ in stats.data] == ["text.txt", "more.jsonl"]
    assert set(stats.layers) == {0, 1}
    assert set(stats.layers[0]) == {*SIMILARITIES, "coverage"}
    few = [e for layer in stats.layers.values() for e in layer["coverage"].tolist() if e < 32]
    assert ("warning:" in output) == bool(few)


def test_command_names_experts_without_tokens(command):
    code, output = command("--text", "same.txt", "--tokens", "256", "--sequence", "64")
    assert code == 2
    assert "cannot read same.txt" in output
    Path("same.txt").write_text(words(3000, 7))  # one word again and again reaches few experts
    code, output = command("--text", "same.txt", "--tokens", "256", "--sequence", "64")
    assert code == 0
    stats = Statistics.load("stats.safetensors")
    unseen = [f"{i}:{e}" for i, t in stats.layers.items() for e, n in enumerate(t["coverage"].tolist()) if n == 0]
    assert unseen
    assert "no token reached these experts (layer:expert), so nothing is known of their use: " in output
    assert ", ".join(unseen[:12]) in output


def test_command_scores_domains_and_layers(command, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": words(3000, 7)}))
    arguments = ("--text", "text.txt", "--text", "more.jsonl", "--tokens", "512", "--sequence", "64")
    code, output = command(*arguments, "--energy", "--sensitivity")
    assert code == 0, output
    assert "domains with scores of their own, for `carpool allow-list --domain`: 'text', 'more'" in output
    tensors = Statistics.load("stats.safetensors").layers
    for layer in tensors.values():
        assert int(layer["coverage/text"].sum()) == int(layer["coverage/more"].sum()) == 256 * 2
        assert torch.equal(layer["coverage/text"] + layer["coverage/more"], layer["coverage"])
        for name in ("easy_ep", "easy_ep/text", "easy_ep/more"):
            assert layer[name].sum().item() == pytest.approx(1, abs=1e-5)
        assert not torch.allclose(layer["easy_ep/text"], layer["easy_ep/more"])
    assert sum(layer["sensitivity"].item() for layer in tensors.values()) == pytest.approx(1)


def test_no_residual_stream_where_the_blocks_output_is_normalised():
    model = tiny_model("flex_olmo")
    assert all(routed.residual_NH is None for routed in capture(model, find_layers(model), IDS_BT[:4]))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_residual_stream(family):
    """What a decoder layer returns, less its MoE block's output; nothing if that is not how the layer adds."""
    model = tiny_model(family)
    layers = find_layers(model)
    seen = {}
    hooks = []
    for layer in layers:
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        for key, module in (("block", layer.block), ("layer", parent)):
            hooks.append(
                module.register_forward_hook(
                    lambda _m, _a, out, at=(layer.index, key): seen.update(
                        {at: out[0] if isinstance(out, tuple) else out}
                    )
                )
            )
    found = capture(model, layers, IDS_BT[:4])
    for hook in hooks:
        hook.remove()
    for layer, routed in zip(layers, found, strict=True):
        after, block = (seen[layer.index, key].reshape(-1, 32) for key in ("layer", "block"))
        torch.testing.assert_close(routed.residual_NH, after - block, atol=1e-4, rtol=1e-4)
    hook = layers[0].block.register_forward_hook(lambda _m, _a, out: doubled(out))
    parent = model.get_submodule(layers[0].name.rpartition(".")[0])
    scaled = parent.register_forward_hook(lambda _m, _a, out: doubled(out))
    assert capture(model, layers, IDS_BT[:4])[0].residual_NH is None
    hook.remove()
    scaled.remove()


def doubled(out):
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


def test_sensitivity_is_the_divergence_without_a_layers_experts():
    model = tiny_model("qwen2_moe")  # with a shared expert, which stays
    layers = find_layers(model)
    told = []
    found = sensitivity(model, layers, IDS_BT, progress=told.append)
    assert sum(told) == 3 * IDS_BT.numel()
    with torch.no_grad():
        stock = model(IDS_BT).logits.double().log_softmax(-1)
        expected = []
        for layer in layers:
            experts, kept = layer.experts, layer.experts.down_proj.data.clone()
            experts.down_proj.data.zero_()
            other = model(IDS_BT).logits.double().log_softmax(-1)
            experts.down_proj.data.copy_(kept)
            expected.append((stock.exp() * (stock - other)).sum(-1).mean().item())
    for layer, kl in zip(layers, expected, strict=True):
        assert found[layer.index]["sensitivity_kl"].item() == pytest.approx(kl, rel=1e-4)
        assert found[layer.index]["sensitivity"].item() == pytest.approx(kl / sum(expected), rel=1e-4)


def test_sensitivity_needs_experts_that_run():
    with pytest.raises(CarpoolError, match="experts were not called"):
        sensitivity(bypassed(), find_layers(bypassed()), IDS_BT)
    model = tiny_model("qwen3_moe")
    for layer in find_layers(model):
        layer.experts.down_proj.data.zero_()
    with pytest.raises(CarpoolError, match="changes nothing"):
        sensitivity(model, find_layers(model), IDS_BT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no text was given"),
        (("--text", "text.txt", "-o", "none/out.safetensors"), "does not exist"),
        (("--text", "text.txt", "-o", "."), "not a regular file"),
        (("--text", "text.txt", "--tokens", "10"), "10 tokens are too few"),
        (("--text", "text.txt", "--sequence", "200", "--tokens", "400"), "exceed the model's 128"),
    ],
)
def test_command_refuses_in_one_sentence(command, tmp_path, arguments, message):
    code, output = command(*arguments)
    assert code == 2
    assert message in output
    assert output.startswith("carpool calibrate: ")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_interrupted_command_leaves_the_old_file(command, tmp_path, monkeypatch):
    (tmp_path / "stats.safetensors").write_text("old")

    def interrupted(tensors, path, metadata):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    code, _ = command("--text", "text.txt", "--tokens", "256", "--sequence", "64")
    assert code != 0
    assert (tmp_path / "stats.safetensors").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "stats.safetensors"}
