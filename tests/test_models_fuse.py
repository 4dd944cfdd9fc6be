"""FusionRoute: equations by brute force, who gets gradients, and caches that equal reading everything again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_experts import END, PAD, write_expert
from torch import Tensor

import carpool
from carpool import CarpoolError
from carpool.models.catchup import CatchUp
from carpool.models.fuse import answer_logprobs, cdpo_loss, fused, informative, pooled, sft_loss

E, B, T, V = 3, 2, 5, 7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fused_logits_are_the_sum_of_log_probabilities() -> None:
    one, other = drawn(4, V), drawn(4, V, seed=1)
    torch.testing.assert_close(fused(one, other), one.softmax(-1).log() + other.softmax(-1).log(), atol=1e-6, rtol=0)


def test_informative_positions_by_brute_force() -> None:
    logits_EBTV = drawn(E, B, T, 2)
    for b in range(B):
        for t in range(T):
            best = {int(logits_EBTV[e, b, t].argmax()) for e in range(E)}
            assert bool(informative(logits_EBTV)[b, t]) == (len(best) > 1)
    assert not informative(logits_EBTV[:1]).any()


@pytest.mark.parametrize("pooling", ["logits", "mean"])
def test_pooling_by_brute_force(pooling: Any) -> None:
    weights_BTE, logits_EBTV = drawn(B, T, E), drawn(E, B, T, V, seed=1)
    made = pooled(weights_BTE, logits_EBTV, pooling)
    w_E = weights_BTE[1, 2].softmax(-1)
    by_hand = sum(w_E[e] * logits_EBTV[e, 1, 2].log_softmax(-1) for e in range(E))
    torch.testing.assert_close(made[1, 2], by_hand.log_softmax(-1) if pooling == "logits" else by_hand)
    assert torch.equal(
        pooled(weights_BTE + 3, logits_EBTV, pooling) - made < 1e-5, torch.ones(B, T, V, dtype=torch.bool)
    )


def test_the_first_phase_trains_router_and_head_but_no_expert() -> None:
    router_BTV, weights_BTE, experts_EBTV = (
        one.requires_grad_() for one in (drawn(B, T, V), drawn(B, T, E), drawn(E, B, T, V))
    )
    targets_BT = torch.arange(B * T).reshape(B, T) % V
    counted_BT = torch.ones(B, T, dtype=torch.bool)
    counted_BT[1, 3:] = False
    own, routed = sft_loss(router_BTV, weights_BTE, experts_EBTV, targets_BT, counted_BT)
    (own + routed).backward()
    assert experts_EBTV.grad is None
    told_BT = informative(experts_EBTV) & counted_BT
    assert ((weights_BTE.grad != 0).any(-1) == told_BT).all()
    assert ((router_BTV.grad != 0).any(-1) == counted_BT).all()
    by_hand = [-float(pooled(weights_BTE, experts_EBTV)[b, t, targets_BT[b, t]]) for b, t in told_BT.nonzero().tolist()]
    assert float(routed) == pytest.approx(sum(by_hand) / len(by_hand) / 3)
    cross = torch.nn.functional.cross_entropy(router_BTV[counted_BT], targets_BT[counted_BT])
    assert float(own) == pytest.approx(float(cross))
    _, nothing = sft_loss(router_BTV, weights_BTE[..., :1], experts_EBTV[:1], targets_BT, counted_BT)
    assert float(nothing) == 0


def test_the_second_phase_by_hand_and_its_readings() -> None:
    router, reference, expert = (drawn(2, B, T, seed=s).requires_grad_() for s in range(3))
    counted = torch.ones(2, B, T, dtype=torch.bool)
    loss = cdpo_loss(router, reference, expert, counted, beta=0.5)
    gap = (router - reference).sum(-1)
    inside = gap[0] - gap[1] + expert.sum(-1)[0] - expert.sum(-1)[1]
    assert float(loss) == pytest.approx(float(-(0.5 * inside).sigmoid().log().mean()))
    loss.backward()
    assert reference.grad is None
    assert expert.grad is None
    assert router.grad is not None
    plain = cdpo_loss(router, reference, expert, counted, beta=0.5, reference="fused")
    assert float(plain) == pytest.approx(float(-(0.5 * (gap[0] - gap[1])).sigmoid().log().mean()))
    # where the expert prefers the better answer anyway, little is left to learn
    sure = torch.stack([torch.zeros(B, T), torch.full((B, T), -9.0)])
    before, router.grad = router.grad.abs().sum(), None
    cdpo_loss(router, reference, sure, counted, beta=0.5).backward()
    assert router.grad.abs().sum() < 0.1 * before


def test_exact_log_probabilities_count_the_normaliser() -> None:
    router_BTV, expert_BTV = drawn(B, T, V), drawn(B, T, V, seed=1)
    targets_BT = torch.arange(B * T).reshape(B, T) % V
    own, expert = answer_logprobs(router_BTV, expert_BTV, targets_BT, exact=True)
    whole = fused(router_BTV, expert_BTV).log_softmax(-1).gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own + expert, whole)
    loose, same = answer_logprobs(router_BTV, expert_BTV, targets_BT)
    torch.testing.assert_close(same, expert)
    assert (loose < own).all(), "the paper's terms leave the normaliser out, which is below 1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    root, made = tmp_path_factory.mktemp("fused"), {}
    for seed, name in enumerate(("router", "a", "b", "c")):
        folder = write_expert(root / name, seed + 10, ends=name in ("b", "c"))
        made[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return made


def head(models: dict[str, Any], count: int = 3) -> Tensor:
    return drawn(count, models["router"].config.hidden_size, seed=7)


def batch() -> tuple[Tensor, Tensor]:
    rows = [[5, 6, 7, 8, 9, 10], [40, 41], [90, 91, 92, 93]]
    ids = torch.tensor([[PAD] * (6 - len(row)) + row for row in rows])
    return ids, (ids != PAD).long()


def again(models: dict[str, Any], ids: list[int], expert: str, router_logits: bool = True) -> Tensor:
    """Logits after a text, from reading all of it."""
    with torch.inference_mode():
        own_V, other_V = (models[name](torch.tensor([ids])).logits[0, -1] for name in ("router", expert))
    return fused(own_V, other_V) if router_logits else other_V


@pytest.mark.parametrize("router_logits", [True, False])
def test_a_switch_at_every_step_is_exact(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, router_logits: bool
) -> None:
    ids, mask = batch()
    names, turn = ["a", "b", "c"], iter(range(99))
    experts = {name: models[name] for name in names}
    with carpool.fuse(models["router"], experts, head(models), router_logits=router_logits) as run:
        monkeypatch.setattr(run, "choose", lambda texts, live: (torch.arange(3) + next(turn)) % 3)
        made = run.generate(ids, mask, max_new_tokens=12, do_sample=False, pad_token_id=PAD, output_scores=True,
                            return_dict_in_generate=True)  # fmt: skip
    for row in range(3):
        text = ids[row][mask[row].bool()].tolist()
        for step, token in enumerate(made.sequences[row, 6:].tolist()):
            if END in text:
                assert token == PAD
                continue
            wanted_V = again(models, text, names[(row + step) % 3], router_logits)
            torch.testing.assert_close(made.scores[step][row].double(), wanted_V.double(), atol=2e-6, rtol=0)
            assert token == int(wanted_V.argmax())
            text.append(token)
    told = run.report()
    steps = made.sequences.shape[1] - 6
    assert told.steps == steps
    lengths = [(made.sequences[row, 6:] != PAD).sum().item() for row in range(3)]
    assert told.tokens == sum(lengths) == sum(told.chosen.values())
    assert told.switches == sum(lengths) - 3
    # an expert's first turn at step s reads the prompt and s - 1 late tokens, each later one 2
    firsts = sum(max(0, step - 1) for length in lengths for step in range(min(3, length)))
    assert told.caught_up == firsts + sum(2 * max(0, length - 3) for length in lengths)
    assert told.prompt == sum(min(3, n) * size for n, size in zip(lengths, (6, 2, 4), strict=True))


def test_one_expert_alone_is_that_expert_bit_for_bit(models: dict[str, Any]) -> None:
    ids = batch()[0][:1]
    stock = models["c"].generate(ids, max_new_tokens=12, do_sample=True, pad_token_id=PAD, output_scores=True,
                                 return_dict_in_generate=True, generation_config=seeded(models["c"]))  # fmt: skip
    with carpool.fuse(models["router"], {"c": models["c"]}, head(models, 1), router_logits=False) as run:
        made = run.generate(ids, max_new_tokens=12, do_sample=True, pad_token_id=PAD, output_scores=True,
                            return_dict_in_generate=True, generation_config=seeded(models["router"]))  # fmt: skip
    assert torch.equal(made.sequences, stock.sequences)
    for one, other in zip(made.scores, stock.scores, strict=True):
        assert torch.equal(one, other)
    assert run.report().switches == run.report().caught_up == 0


def seeded(model: Any) -> Any:
    torch.manual_seed(3)
    return model.generation_config


def test_rows_decide_alone_without_a_plan_and_share_under_one(models: dict[str, Any]) -> None:
    ids, mask = batch()
    experts = {name: models[name] for name in "abc"}
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    with carpool.fuse(models["router"], experts, head(models)) as run:
        together = run.generate(ids, mask, **how)
        order = torch.tensor([2, 0, 1])
        assert torch.equal(run.generate(ids[order], mask[order], **how), together[order])
        for row in range(3):
            alone = run.generate(ids[row][mask[row].bool()][None], **how)
            assert (
                alone[0, int(mask[row].sum()) :].tolist()
                == together[row, 6 : 6 + alone.shape[1] - int(mask[row].sum())].tolist()
            )
    with carpool.fuse(models["router"], experts, head(models), plan="xshare(1, warmup=0)") as run:
        run.generate(ids, mask, **how)
    told = run.report()
    assert told.reads == 2 * told.steps, "one expert a step beside the router"
    assert told.natural > told.steps
    assert "models and" in str(told)
    size = sum(one.numel() * 8 for one in models["a"].parameters())
    assert told.bytes == 2 * size * told.steps


def test_a_price_of_switching_is_paid(models: dict[str, Any]) -> None:
    ids, mask = batch()
    experts = {name: models[name] for name in "abc"}
    switches = []
    for cost in (0.0, 100.0):
        with carpool.fuse(models["router"], experts, head(models), switch_cost=cost) as run:
            run.generate(ids, mask, max_new_tokens=10, do_sample=False, pad_token_id=PAD)
        switches.append(run.report().switches)
    assert switches[0] > switches[1] == 0


def test_what_cannot_be_exact_is_refused(models: dict[str, Any], tmp_path: Path) -> None:
    router, experts = models["router"], {"a": models["a"]}
    with carpool.fuse(router, experts, head(models, 1)) as run:
        for how in ({"num_beams": 2}, {"assistant_model": models["a"]}):
            with pytest.raises(CarpoolError, match="rows change their places"):
                run.generate(batch()[0], **how)
    with pytest.raises(CarpoolError, match="inside its block only"):
        run.generate(batch()[0])
    with pytest.raises(CarpoolError, match=r"the head is \[3, 16\]"):
        carpool.fuse(router, experts, head(models))
    with pytest.raises(CarpoolError, match="no experts"):
        carpool.fuse(router, {}, head(models))
    with pytest.raises(CarpoolError, match="what only layers"):
        carpool.fuse(router, experts, head(models, 1), plan="sere(1)")
    save_file({"w": torch.zeros(2)}, tmp_path / "h.safetensors")
    with pytest.raises(CarpoolError, match="holds no router_head"):
        carpool.fuse(router, experts, tmp_path / "h.safetensors")
    reader = CatchUp(models["a"])
    reader.logits(0, [1, 2, 3])
    for other in ([1, 2, 3], [1, 2], [1, 9, 3, 4]):
        with pytest.raises(CarpoolError, match="rows must keep their places"):
            reader.logits(0, other)
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    with pytest.raises(CarpoolError, match="needs one vocabulary; entries: the router 258, a 258, small 9"):
        carpool.fuse(router, {**experts, "small": small}, head(models, 2))
