"""The recipe of the block-diffusion model: its training pass is what decoding computes, its noise what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = [8, 16, 32]
MASK = 96


@pytest.fixture
def model(recipe):
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    }
    model = recipe("train").build_model(config, vocab_size=MASK + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)  # so that attention and routers tell tokens apart
    return model


def noised_rows(recipe, length: int = 128, copies: int = 2, rows: int = 3, seed: int = 0):
    clean = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))
    return recipe("denoiser").noised(clean, SIZES, copies, MASK, np.random.default_rng(seed))


def decoded_states(model, clean_S: torch.Tensor, noisy_CS: torch.Tensor, size: int) -> torch.Tensor:
    """What a decoder computes, `[C, S, H]`: each noisy block behind a cache of the clean blocks before it."""
    from transformers import DynamicCache

    cache, states = DynamicCache(config=model.config), []
    for start in range(0, len(clean_S), size):
        span = slice(start, start + size)
        seen = torch.ones(1, 1, size, start + size, dtype=torch.bool)
        for copy, tokens_S in enumerate((*noisy_CS, clean_S)):  # the clean block comes last and stays in the cache
            if copy:
                cache.crop(-size)
            position = torch.arange(start, start + size)[None]
            output = model.model(
                tokens_S[None, span], attention_mask=seen, position_ids=position, past_key_values=cache
            )
            states.append(output.last_hidden_state[0])
    copies = len(noisy_CS) + 1
    return torch.stack([torch.cat(states[copy::copies]) for copy in range(copies - 1)])


@torch.no_grad()
def test_training_pass_is_what_decoding_computes(recipe, model):
    model.set_experts_implementation("eager")
    batch = noised_rows(recipe)
    states_MH = recipe("denoiser").masked_states(model, batch)
    assert sorted(batch.block_B) == SIZES
    decoded = [
        decoded_states(model, clean_S, noisy_CS, size)
        for clean_S, noisy_CS, size in zip(batch.clean_BS, batch.noisy_BCS, batch.block_B, strict=True)
    ]
    torch.testing.assert_close(states_MH, torch.stack(decoded)[batch.masked_BCS], rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_weighted_loss(recipe, model):
    denoiser, adapt, train = recipe("denoiser"), recipe("adapt"), recipe("train")
    model.double()
    captured: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    batch = noised_rows(recipe, length=256, copies=3)  # more masked tokens than one chunk of the output head
    loss_M, even = adapt.backward(model, batch, captured, balance=0.5)
    assert len(loss_M) > denoiser.HEAD_ROWS
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    captured.clear()
    targets = batch.clean_BS[:, None].expand_as(batch.masked_BCS)[batch.masked_BCS]
    logits = model.lm_head(denoiser.masked_states(model, batch))
    plain_M = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    balance = train.balance_loss(captured, 2)
    ((plain_M * batch.weight_BCS[batch.masked_BCS]).sum() / batch.masked_BCS.numel() + 0.5 * balance).backward()
    torch.testing.assert_close(loss_M.double(), plain_M.detach(), rtol=1e-4, atol=1e-5)
    assert even == pytest.approx(balance.item())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-9, msg=name)


def test_kernels_have_the_gradients_of_what_they_compute(recipe):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

    kernels = recipe("kernels")
    torch.manual_seed(0)
    norm = Qwen3MoeRMSNorm(8).double()
    norm.weight.data.uniform_(0.5, 2)
    cos_SD, sin_SD = (torch.randn(5, 4).repeat(1, 2).double() for _ in range(2))
    x = torch.randn(2, 3, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    theirs, _ = apply_rotary_pos_emb(norm(x), norm(x), cos_SD[None], sin_SD[None], unsqueeze_dim=2)
    pairs = {
        "norm": (lambda: kernels.rms_norm(norm, x), lambda: norm(x)),
        "rotary": (lambda: kernels.head_norm_rotary(norm, x, (cos_SD, sin_SD)), lambda: theirs.transpose(2, 3)),
    }
    for name, (ours, plain) in pairs.items():
        found = [compute() for compute in (ours, plain)]
        weight = torch.randn_like(found[0])
        gradients = [torch.autograd.grad((y * weight).sum(), [x, norm.weight]) for y in found]
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6, msg=name)  # transformers' norm goes through fp32
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


def test_noise_is_uniform_over_levels_and_weighs_every_block_alike(recipe):
    batch = noised_rows(recipe, length=256, copies=4, rows=30)
    assert sorted(batch.block_B) == sorted(SIZES * 10)
    masked = batch.noisy_BCS == MASK
    assert torch.equal(masked, batch.masked_BCS)
    clean = batch.clean_BS[:, None].expand_as(masked)
    assert torch.equal(batch.noisy_BCS[~masked], clean[~masked])
    for row, size in enumerate(batch.block_B):
        blocks = masked[row].view(-1, size)
        level = blocks.sum(1)
        assert level.min() >= 1
        assert abs(level.float().mean() - (size + 1) / 2) < 0.5, "levels are spread evenly over a row's blocks"
        weight = batch.weight_BCS[row].view(-1, size)
        torch.testing.assert_close(weight.sum(1), torch.full((len(level),), float(size)))
        assert (weight[~blocks] == 0).all()
    assert (masked.float().mean((0, 1)) - 0.54).abs().max() < 0.2, "no position is favoured"


def test_noise_depends_on_its_seed_alone(recipe):
    first, again, other = (noised_rows(recipe, seed=seed).noisy_BCS for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_exported_checkpoint_loads_as_it_was_trained(recipe, model, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, reference = recipe("checkpoint"), tmp_path / "reference"
    vocabulary = {"<|endoftext|>": 0, "<|pad|>": 1, **{f"t{n}": n for n in range(2, MASK + 1)}}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>")).save(str(tmp_path / "tokenizer.json"))
    model.save_pretrained(reference)
    adapted = checkpoint.adapted(reference)
    assert adapted.config.vocab_size == MASK + 2
    assert adapted.config.mask_token_id == MASK + 1
    weight = adapted.get_input_embeddings().weight
    torch.testing.assert_close(weight[-1], weight[:-1].mean(0))
    torch.save({"model": adapted.state_dict(), "step": 7, "masked": 5}, tmp_path / "last.pt")
    checkpoint.export(tmp_path / "last.pt", reference, tmp_path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "Qwen3MoeForCausalLM"
    assert loaded.config.mask_token_id == AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == MASK + 1
    assert loaded.config.block_size in loaded.config.block_sizes
    assert torch.equal(loaded.lm_head.weight, adapted.lm_head.weight.bfloat16())
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["noisy_tokens"] == 3 * facts["text_tokens"] == 7 * 9 * 3 * 256


def test_losses_are_those_of_the_noise_they_are_asked_for(recipe, model):
    heldout, denoiser = recipe("heldout"), recipe("denoiser")
    rng = np.random.default_rng(0)
    text_WS = rng.integers(0, MASK, (2, 128))
    batch = denoiser.noised_to(torch.from_numpy(text_WS), 16, [0.25, 1.0], MASK, rng)
    assert torch.equal(batch.masked_BCS.view(2, 2, 8, 16).sum(-1), torch.tensor([4, 16])[None, :, None].expand(2, 2, 8))
    with torch.no_grad():
        loss_BCS = heldout.losses(model, batch)
        states = denoiser.masked_states(model, batch)
        logits = model.lm_head(states)
    assert torch.equal(loss_BCS.isnan(), ~batch.masked_BCS)
    targets = batch.clean_BS[:, None].expand_as(batch.masked_BCS)[batch.masked_BCS]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss_BCS[batch.masked_BCS], expected)
    found = heldout.denoising(model, text_WS, 8, [0.5, 1.0], 1, "test")
    assert list(found) == ["0.5", "1.0", "bound"]
    assert all(loss_W.shape == (2,) and np.isfinite(loss_W).all() for loss_W in found.values())


def test_a_text_is_recognised_by_its_tokens(recipe, tmp_path):
    samples = recipe("samples")
    np.array([0, 0, 0, 1], dtype=np.uint16).tofile(tmp_path / "zeros.train.bin")
    np.array([2, 2, 1, 2], dtype=np.uint16).tofile(tmp_path / "twos.train.bin")
    shares_DV = samples.token_log_shares(tmp_path, ["zeros", "twos"], 4)
    assert np.exp(shares_DV).sum(1) == pytest.approx([1, 1])
    assert samples.recognised([[0, 1, 0], [2, 1], []], 0, shares_DV) == pytest.approx(1 / 3)
    assert samples.recognised([[0, 1, 0], [2, 1]], 1, shares_DV) == pytest.approx(1 / 2)
    assert samples.variety([[1, 1, 1, 1], [1, 2]]) == pytest.approx((0.25 + 1) / 2)


def test_shipped_model_and_its_card(recipe):
    """The card is made from the numbers beside it, and the weights say what a decoder has to know."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from carpool_demo import diffusion_model_path

    folder = diffusion_model_path()
    facts = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = recipe("ship").readme(facts, facts["samples"], config["mask_token_id"])
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    assert facts["training"]["noisy_tokens"] >= 8_000_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(folder).mask_token_id == 8192
    assert model.config.vocab_size == 8193
    assert model.config.block_size in model.config.block_sizes == SIZES
