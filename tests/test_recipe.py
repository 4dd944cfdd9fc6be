"""The recipe of the reference model: its kernel, its data order, its baselines and what the demo embeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

RECIPE = Path(__file__).parents[1] / "recipes" / "reference_model"


@pytest.fixture
def tiny_config() -> dict:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    }


@pytest.fixture
def second_config() -> dict:
    """The second model's family, as small as it gets: a dense layer, a sparse one of 4 groups."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "tie_word_embeddings": True}
    return {"model_type": "deepseek_v3"} | sizes | attention | heads | experts | layers


def loss_and_gradients(model, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    loss.backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["tiny_config", "second_config"])
def test_experts_kernel_is_the_eager_one(recipe, family, request):
    torch.manual_seed(0)
    model = recipe("train").build_model(request.getfixturevalue(family), vocab_size=64).double()
    tokens = torch.randint(0, 64, (2, 9))
    ours, our_gradients = loss_and_gradients(model, tokens)
    model.set_experts_implementation("eager")
    theirs, their_gradients = loss_and_gradients(model, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    sparse = max(name for name in their_gradients if name.endswith("mlp.experts.down_proj"))
    assert their_gradients[sparse].abs().sum() > 0


def test_correction_bias_evens_the_load(recipe, second_config):
    torch.manual_seed(0)
    train = recipe("train")
    model = train.build_model(second_config, vocab_size=64)
    (router,) = train.routers_of(model)
    with torch.no_grad():
        router.weight.mul_(20)  # logits as far apart as a trained router's
    hidden_NH, busiest = torch.randn(512, 32) + 0.3, []  # a common direction favours some experts
    for _ in range(300):
        load = train.loads([router(hidden_NH)[2]], router.num_experts)
        assert load[0].sum().item() == pytest.approx(16)
        busiest.append(load[0].max().item())
        train.correct([router], load, 0.003)
    assert busiest[0] > 1.5
    assert max(busiest[-10:]) < 1.2
    assert router.e_score_correction_bias.abs().amax() > 0.01


def test_saved_model_chooses_the_same_experts(recipe, second_config, tmp_path):
    """The bias stays in fp32: rounded to bf16 it would swap experts that are close."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    train = recipe("train")
    model = train.build_model(second_config, vocab_size=64)
    (router,) = train.routers_of(model)
    bias_E = 1 + torch.rand(16) * 1e-3  # bf16 would make most of them equal
    router.e_score_correction_bias.copy_(bias_E)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    train.save_model(model, tmp_path, tokens=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(train.routers_of(loaded)[0].e_score_correction_bias, bias_E)


def test_second_configuration_is_the_first_one_but_for_its_router(recipe):
    load_config, folder = recipe("corpus").load_config, RECIPE
    first, second = load_config(), load_config(folder / "config_deepseek.toml")
    assert [first[part] for part in ("tokenizer", "mixture")] == [second[part] for part in ("tokenizer", "mixture")]
    for name in ("sequence", "batch", "learning_rate", "decay_fraction", "seed"):
        assert first["train"][name] == second["train"][name], name
    for name in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok"):
        assert first["model"][name] == second["model"][name], name


def test_wide_configuration_is_the_first_one_but_for_the_width_of_its_experts(recipe):
    load_config = recipe("corpus").load_config
    first, wide = load_config(), load_config(RECIPE / "config_wide.toml")
    sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    experts, active, width = (wide["model"].pop(name) / first["model"].pop(name) for name in sizes)
    assert wide == first
    assert experts == active == 1 / width < 1, "as many parameters, as many of them active"


def test_chunked_backward_is_the_plain_one(recipe, tiny_config):
    torch.manual_seed(0)
    train = recipe("train")
    model = train.build_model(tiny_config, vocab_size=64).double()
    captured: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    tokens = torch.randint(0, 64, (3, 400))  # more rows than one chunk of the output head
    total, even = train.backward(model, tokens, captured, balance=0.5)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    captured.clear()
    logits = model(tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
    # the recipe takes the head's logits to fp32 before the loss
    loss = torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())
    balance = train.balance_loss(captured, 2)
    (loss + 0.5 * balance).backward()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert even == pytest.approx(balance.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-7, msg=name)


def test_batches_depend_on_seed_and_step_alone(recipe):
    batch_at = recipe("train").batch_at
    streams = {"even": np.arange(0, 2000, 2, dtype=np.uint16), "odd": np.arange(1, 2001, 2, dtype=np.uint16)}
    mixture, train = {"even": 0.75, "odd": 0.25}, {"seed": 3, "sequence": 8, "batch": 400}
    first = batch_at(5, streams, mixture, train)
    assert first.shape == (400, 9)
    assert torch.equal(first, batch_at(5, streams, mixture, train))
    assert not torch.equal(first, batch_at(6, streams, mixture, train))
    assert not torch.equal(first, batch_at(5, streams, mixture, train | {"seed": 4}))
    assert (first.diff(dim=1) == 2).all(), "a row is a run of one stream"
    assert 0.15 < (first[:, 0] % 2).float().mean() < 0.35


def kneser_ney_twin(rows: list[list[int]], vocabulary: int, history: tuple[int, ...], token: int, order: int) -> float:
    """The model's equations on Python dictionaries, one n-gram at a time."""

    def grams(n: int) -> dict[tuple[int, ...], float]:
        """Counts at the highest order; below, the number of distinct left neighbours."""
        longer = n if n == order else n + 1
        seen = [tuple(row[i : i + longer]) for row in rows for i in range(len(row) - longer + 1)]
        found: dict[tuple[int, ...], float] = {}
        for gram in seen if n == order else set(seen):
            found[gram[-n:]] = found.get(gram[-n:], 0) + 1
        return found

    def probability(n: int, history: tuple[int, ...]) -> float:
        if n == 0:
            return 1 / vocabulary
        counts = grams(n)
        context = history[len(history) - n + 1 :]
        below = probability(n - 1, history)
        total = sum(count for gram, count in counts.items() if gram[:-1] == context)
        if len(history) < n - 1 or not total:
            return below
        m = [max(1, sum(count == k for count in counts.values())) for k in (1, 2, 3, 4)]
        share = m[0] / (m[0] + 2 * m[1])
        cut = [min(max(k - (k + 1) * share * m[k] / m[k - 1], 0.1), k) for k in (1, 2, 3)]
        taken = sum(cut[int(min(count, 3)) - 1] for gram, count in counts.items() if gram[:-1] == context)
        count = counts.get((*context, token), 0)
        kept = count - cut[int(min(count, 3)) - 1] if count else 0
        return (kept + taken * below) / total

    return probability(order, history)


def test_kneser_ney(recipe):
    rng = np.random.default_rng(0)
    vocabulary, order = 5, 3
    rows = rng.choice(vocabulary, size=(8, 14), p=[0.5, 0.25, 0.15, 0.1, 0.0])
    model = recipe("baselines").KneserNey(rows, vocabulary, order)
    for history in [(0,), (4,), (0, 1), (3, 3), (4, 0), (2, 1, 0)]:
        losses = [model.loss(np.array([*history, token]))[-1] for token in range(vocabulary)]
        twin = [kneser_ney_twin(rows.tolist(), vocabulary, history, token, order) for token in range(vocabulary)]
        assert np.exp(-np.array(losses)) == pytest.approx(twin), history
        assert np.exp(-np.array(losses)).sum() == pytest.approx(1)
    stream = rng.integers(0, vocabulary, 12)
    alone = [model.loss(stream[: end + 1])[-1] for end in range(1, 12)]
    assert model.loss(stream) == pytest.approx(np.array(alone))


def test_mutual_information_and_load(recipe):
    card = recipe("card")
    apart = np.zeros((1, 4, 4))
    apart[0, np.arange(4), np.arange(4)] = 1
    assert card.mutual_information(apart) == pytest.approx([2.0])
    assert card.mutual_information(np.full((1, 4, 4), 0.25)) == pytest.approx([0.0])
    load = card.expert_load(np.array([[[0.9, 0.1, 0.0], [0.1, 0.1, 0.8]]]), np.array([0.25, 0.75]))
    assert load["of_expert"] == [pytest.approx([0.3, 0.1, 0.6])]
    assert len(load["out_of_bounds"]) == 3


def test_windows_tile_the_stream(recipe):
    card = recipe("card")
    sample = card.sample_windows(np.zeros(card.WINDOWS * 8 * 2), 8, np.random.default_rng(0))
    assert sample.targets_WT.shape == (card.WINDOWS, 8)
    assert len(np.unique(sample.targets_WT)) == sample.targets_WT.size
    everything = card.sample_windows(np.zeros(33), 8, np.random.default_rng(0))
    assert everything.targets_WT.ravel().tolist() == list(range(1, 33))


def test_embedded_text(recipe):
    from carpool_demo import TEXTS

    texts = recipe("texts")
    files = sorted(TEXTS.iterdir())
    assert [file.stem for file in files] == sorted(texts.DOMAINS)
    assert sum(file.stat().st_size for file in files) <= 300_000
    allowed = {(source.domain, source.licence, source.credit) for source in texts.SOURCES}
    assert {licence for _, licence, _ in allowed} == {"public domain", "MIT", "PSF-2.0"}
    notices = "".join(path.read_text() for path in (RECIPE.parents[1] / "demo" / "LICENSES").iterdir())
    for file in files:
        documents = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(documents) == texts.DOCUMENTS
        assert len({document["text"] for document in documents}) == texts.DOCUMENTS
        for document in documents:
            assert document["source"]
            assert (file.stem, document["licence"], document["credit"]) in allowed
            assert len(document["text"]) >= 1500
            if file.stem in ("python", "javascript"):
                assert not texts.NOTICE.search(document["text"])
    for holder in ("Python Software Foundation", "The Algorithms", "three.js authors", "OpenAI"):
        assert holder in notices


def corpus_of(folder: Path, module: ModuleType) -> Path:
    """A made-up corpus with every source of the recipe, too small to choose from unless `DOCUMENTS` is lowered."""
    for source in module.SOURCES:
        (folder / source.domain).mkdir(parents=True, exist_ok=True)
        (folder / source.domain / "train.jsonl").touch()
        with (folder / source.domain / "heldout.jsonl").open("a") as lines:
            for number in range(4):
                name = f"{source.prefix}x/{number}.py"
                body = "".join(f"a line of {name} of some length, number {line}\n" for line in range(60))
                notice = "# Copyright someone\n" if number == 3 else ""
                lines.write(json.dumps({"source": name, "text": notice + body}) + "\n")
    return folder


def test_embedded_text_is_chosen_alike_and_without_notices(recipe, tmp_path, monkeypatch):
    texts = recipe("texts")
    monkeypatch.setattr(texts, "DOCUMENTS", 3)
    corpus = corpus_of(tmp_path / "corpus", texts)
    chosen = texts.write(corpus, tmp_path / "one")
    texts.write(corpus, tmp_path / "two")
    for domain, documents in chosen.items():
        one, two = ((tmp_path / run / f"{domain}.jsonl").read_bytes() for run in ("one", "two"))
        assert one == two
        assert len(documents) == 3
        if domain in ("python", "javascript"):
            assert not any(document["source"].endswith("x/3.py") for document in documents)
    train = corpus / "javascript" / "train.jsonl"
    train.write_text((corpus / "javascript" / "heldout.jsonl").read_text())
    with pytest.raises(SystemExit, match="javascript: only 0 documents of 3"):
        texts.write(corpus, tmp_path / "three")
