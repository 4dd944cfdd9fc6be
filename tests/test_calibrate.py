"""Calibration of real (tiny) models: families, chunks, precision, refusals, the residual stream, sensitivity."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tokens

from carpool import CarpoolError
from carpool.calibrate import calibrate, run
from carpool.calibrate.capture import Experts, capture
from carpool.calibrate.sensitivity import sensitivity
from carpool.hosts.transformers import find_layers, identity

IDS_BT = tokens(rows=16, length=24)


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
    assert not stats.check(identity(find_layers(model)))
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
    assert told == [96] * 4
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


class Packed(torch.nn.Module):
    """Experts in 4 bits: two weights a byte and a factor a row, unpacked on the way."""

    def __init__(self, plain, dtype, registered=True):
        super().__init__()
        self.plain = [plain]  # not a submodule
        for name, weight in plain.named_parameters():
            scale = weight.detach().abs().amax(-1, keepdim=True) / 7
            codes = ((weight.detach() / scale).round() + 8).to(torch.uint8)
            packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(dtype)
            for key, tensor in ((f"{name}_packed", packed), (f"{name}_scale", scale)):
                if registered:
                    self.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))
                else:
                    self.__dict__[key] = tensor

    def forward(self, hidden, ids, weights):
        codes = {}
        for name, weight in self.plain[0].named_parameters():
            packed, scale = getattr(self, f"{name}_packed").to(torch.uint8), getattr(self, f"{name}_scale")
            codes[name] = (torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(weight.dtype) - 8) * scale
        return torch.func.functional_call(self.plain[0], codes, (hidden, ids, weights))


def packed(dtype, **how):
    def make():
        model = tiny_model("qwen3_moe")
        for layer in find_layers(model):
            layer.block.experts = Packed(layer.experts, dtype, **how)
        assert model(IDS_BT).logits.isfinite().all()  # such a model runs
        return model

    return make


class Quantised(torch.Tensor):
    """A tensor that says it holds floats and does not, as some libraries make them."""


def disguised():
    model = tiny_model("qwen3_moe")
    experts = find_layers(model)[0].experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.as_subclass(Quantised), requires_grad=False)
    return model


def offloaded():
    model = tiny_model("qwen3_moe")
    find_layers(model)[1].experts.to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (packed(torch.uint8), "layer 0: experts stored as torch.uint8; calibrate the unquantised model"),
        (packed(torch.int32), "layer 0: experts stored as torch.int32"),
        (packed(torch.uint8, registered=False), "layer 0: experts stored as something that Packed keeps to itself"),
        (disguised, "layer 0: experts stored as Quantised"),
        (offloaded, "layer 1: experts that are not in memory"),
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
