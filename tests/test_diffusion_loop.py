"""Mask block diffusion: against a twin without a cache, identities, batches, masks."""

from __future__ import annotations

from typing import Any

import diffusion_twins as twins
import pytest
import torch
from diffusion_tools import EXPERTS, MASK, TOP_K, exact_model, prompt, run_with, settings, shown
from tiny_models import tiny_model

from carpool import Batch, share
from carpool.diffusion import Block, Session, generate


@pytest.fixture(scope="module")
def model() -> Any:
    return exact_model()


# against the twin


@pytest.mark.parametrize("length", [0, 1, 4, 6, 11])
@pytest.mark.parametrize(("threshold", "steps"), [(0.2, None), (0.9, 2), (0.05, 3), (0.5, 1)])
def test_stock_is_the_twin(model: Any, length: int, threshold: float, steps: int | None) -> None:
    decoding = settings(threshold=threshold, steps=steps)
    made = run_with(model, [prompt(length)], decoding)
    tokens, accepted = twins.decode(
        model, prompt(length).tolist(), block=4, mask=MASK, threshold=threshold, max_new=10, steps=steps
    )
    assert shown(made) == [tokens]
    assert [int(forward.accepted_RL.sum()) for forward in made.forwards] == [len(one) for one in accepted]
    start = length // 4 * 4
    places = [(forward.accepted_RL[0].nonzero().flatten() + start + 4 * forward.block).tolist()
              for forward in made.forwards]  # fmt: skip
    assert places == accepted


@pytest.mark.parametrize("plan", ["des_seq(k0=1)", "des_vote(size=3)", "topk(k=1)", "des_vote(size=2) | floor(0.5)"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_policy_is_the_twin_with_all_blocks_recomputed(model: Any, plan: str, shared: bool) -> None:
    """Cached decoding equals recomputing every finished block: exempt, or each under its own coreset."""
    text = prompt(8)
    decoding = settings(block=4)
    made = run_with(model, [text], decoding, plan, share_commits=shared)
    if shared:  # the prompt's blocks are exempt in a session, so the twin must not share them either
        with share(model, plan) as run:
            session = Session(model, [text], 4, run=run, share_commits=True)
            first = session.denoise(torch.tensor([[5, MASK, 7, MASK]]))
            session.commit(torch.tensor([[5, 6, 7, 8]]))
            second = session.denoise(torch.tensor([[9, MASK, MASK, 3]]))
        assert (first - _recomputed(model, plan, text, [], [5, MASK, 7, MASK])).abs().max() < 1e-10
        assert (second - _recomputed(model, plan, text, [5, 6, 7, 8], [9, MASK, MASK, 3])).abs().max() < 1e-10
        return
    with share(model, plan) as run:
        tokens, _ = twins.decode(model, text.tolist(), block=4, mask=MASK, threshold=0.2, max_new=10, run=run)
    assert shown(made) == [tokens]


def _recomputed(model: Any, plan: str, text: torch.Tensor, done: list[int], current: list[int]) -> torch.Tensor:
    """Logits of the current block after exempt prompt blocks and shared finished ones."""
    tokens = text.tolist() + done + current
    number_T = torch.arange(len(tokens)) // 4
    with share(model, plan) as run:
        run.batch = Batch.of(
            len(tokens), group_N=number_T, num_groups=int(number_T[-1]) + 1, exempt_N=number_T < len(text) // 4
        )
        with torch.inference_mode():
            mask = twins.block_causal(len(tokens), 4, model.dtype)
            return model(input_ids=torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[:, -4:]


def test_end_tokens_stop_a_request_after_its_block(model: Any) -> None:
    free = shown(run_with(model, [prompt(3)], settings(max_new=12)))[0]
    end = free[4]
    stopped = run_with(model, [prompt(3)], settings(max_new=12, end_tokens=(end,)))
    tokens, _ = twins.decode(
        model, prompt(3).tolist(), block=4, mask=MASK, threshold=0.2, max_new=12, ends=(end,)
    )  # fmt: skip
    assert shown(stopped) == [tokens]
    assert tokens == free[: free.index(end) + 1]
    assert len(stopped.forwards) < len(run_with(model, [prompt(3)], settings(max_new=12)).forwards)


def test_an_end_token_in_the_prompt_stops_nothing(model: Any) -> None:
    text = prompt(6)
    made = run_with(model, [text], settings(end_tokens=(int(text[5]),), threshold=0.9))
    plain, _ = twins.decode(
        model, text.tolist(), block=4, mask=MASK, threshold=0.9, max_new=10, ends=(int(text[5]),)
    )  # fmt: skip
    assert shown(made) == [plain]
    assert len(made.tokens[0]) > 2 or int(text[5]) in plain


# float32, where close is what can be had


def test_cached_and_recomputed_are_close_in_float32() -> None:
    single = tiny_model("qwen3_moe")
    text = prompt(8)
    session = Session(single, [text], 4)
    for current in ([5, MASK, 7, MASK], [MASK] * 4):
        cached = session.denoise(torch.tensor([current]))
        recomputed = twins.last_block_logits(single, text.tolist() + current, 4)
        assert (cached[0] - recomputed).abs().max() < 1e-4
    before = session.denoise(torch.tensor([[MASK] * 4]))
    assert torch.equal(before, session.denoise(torch.tensor([[MASK] * 4]))), "a forward that writes nothing"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations_follow_the_mask(model: Any, attention: str) -> None:
    text = prompt(8)
    was = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        session = Session(model, [text], 4)
        cached = session.denoise(torch.tensor([[5, MASK, 7, MASK]]))[0]
        one_block = session.denoise(torch.tensor([[5, MASK, 7, 8]]))[0]
    finally:
        model.set_attn_implementation(was)
    recomputed = twins.last_block_logits(model, [*text.tolist(), 5, MASK, 7, MASK], 4)
    assert (cached - recomputed).abs().max() < 1e-4  # eager softmax is float32
    assert (cached[0] - one_block[0]).abs().max() > 1e-6, "a block sees its own end"


# identities


@pytest.mark.parametrize(
    "plan", [f"des_vote(size={EXPERTS})", "des_vote(beta=1.0)", f"des_seq(k0={TOP_K})", f"topk(k={TOP_K})",
             f"xshare(budget={EXPERTS})", "des_vote(size=2) | floor(0)"]
)  # fmt: skip
@pytest.mark.parametrize("group", ["request", "batch", "block:2"])
def test_identities_are_token_identical(model: Any, plan: str, group: str) -> None:
    prompts = [prompt(6, 1), prompt(9, 2), prompt(2, 3)]
    stock = run_with(model, prompts, settings())
    same = run_with(model, prompts, settings(), plan, group=group)
    assert shown(same) == shown(stock)
    for mine, theirs in zip(same.forwards, stock.forwards, strict=True):
        assert torch.equal(mine.confidence_RL, theirs.confidence_RL), "bit for bit"


def test_a_coreset_that_holds_the_natural_union_changes_nothing(model: Any) -> None:
    unions: list[int] = []
    decoding, prompts = settings(), [prompt(6)]
    with share(model, f"topk(k={TOP_K})", group="request",
               observe=lambda layer, batch, outcome: unions.append(int(outcome.union_SE.sum()))) as run:  # fmt: skip
        stock = generate(Session(model, prompts, 4, run=run), prompts, decoding)
    size = max(unions)
    assert TOP_K < size <= EXPERTS
    assert shown(run_with(model, prompts, decoding, f"des_vote(size={size})")) == shown(stock)


def test_off_is_stock_bit_for_bit(model: Any) -> None:
    prompts = [prompt(6)]
    before = run_with(model, prompts, settings())
    with share(model, "des_vote(size=2)") as run:
        generate(Session(model, prompts, 4, run=run), prompts, settings())
        assert run.changed_rows() > 0
    after = run_with(model, prompts, settings())
    for mine, theirs in zip(after.forwards, before.forwards, strict=True):
        assert torch.equal(mine.confidence_RL, theirs.confidence_RL)


def test_a_tight_policy_changes_tokens(model: Any) -> None:
    prompts = [prompt(6), prompt(5)]
    assert shown(run_with(model, prompts, settings())) != shown(run_with(model, prompts, settings(), "topk(k=1)"))


# batches


@pytest.mark.parametrize("plan", [None, "des_seq(k0=1)", "des_vote(size=3)"])
def test_a_batch_is_each_request_alone(model: Any, plan: str | None) -> None:
    """Eight prompts of different lengths, some shorter than a block: padding and neighbours change nothing."""
    prompts = [prompt(length, 7) for length in (1, 3, 4, 5, 8, 9, 13, 16)]
    decoding = settings(max_new=9, end_tokens=(5, 40))
    together = run_with(model, prompts, decoding, plan)
    alone = [run_with(model, [one], decoding, plan) for one in prompts]
    assert shown(together) == [shown(one)[0] for one in alone]
    assert together.forwards_B.tolist() == [len(one.forwards) for one in alone]
    assert together.accepted_B.tolist() == [int(one.accepted_B) for one in alone]


def test_the_order_of_requests_changes_nothing(model: Any) -> None:
    prompts = [prompt(length, 3) for length in (2, 7, 8, 12)]
    forth = run_with(model, prompts, settings(), "des_vote(size=3)", group="batch")
    back = run_with(model, prompts[::-1], settings(), "des_vote(size=3)", group="batch")
    assert shown(forth) == shown(back)[::-1]


def test_finished_requests_have_no_rows(model: Any) -> None:
    prompts = [prompt(4), prompt(8), prompt(1)]
    seen: list[int] = []
    with share(model, "des_seq(k0=1)", group="batch",
               observe=lambda layer, batch, outcome: seen.append(int(batch.voter_N.sum()))) as run:  # fmt: skip
        made = generate(Session(model, prompts, 4, run=run), prompts, settings(threshold=0.15))
    layers = 2
    voting = [count for count in seen if count]
    assert voting == [4 * len(forward.request_R) for forward in made.forwards for _ in range(layers)]
    assert len(seen) - len(voting) == layers * (made.commits + 1), "prompts and writing forwards have no voter"
    assert any(len(forward.request_R) < 3 for forward in made.forwards), "somebody waited"
    assert all(forward.masked_RL.any(1).all() for forward in made.forwards)


def test_voters_decide_and_the_others_ride(model: Any) -> None:
    """With one voter and k0=K the coreset is its native experts."""
    prompts = [prompt(8)]
    sizes: list[int] = []

    def first(block: Block, rows: list[int]) -> torch.Tensor:
        voter_RL = torch.zeros(len(rows), 4, dtype=torch.bool)
        voter_RL[:, 0] = True
        return voter_RL

    def observe(layer: int, batch: Any, outcome: Any) -> None:
        if batch.voter_N.any():
            assert batch.voter_N.tolist() == [True, False, False, False]
            sizes.append(int(outcome.union_SE.sum()))

    with share(model, f"des_seq(k0={TOP_K})", group="request", observe=observe) as run:
        generate(Session(model, prompts, 4, run=run), prompts, settings(), voters=first)
    assert sizes
    assert set(sizes) == {TOP_K}


def test_branches_see_their_own_tokens_only(model: Any) -> None:
    text = prompt(9)
    session = Session(model, [text, prompt(4)], 4)
    one, two = [5, MASK, 7, MASK], [5, 6, 7, MASK]
    branches = session.denoise(torch.tensor([one, two, one]), [0, 0, 1])
    for row, (current, whose) in enumerate([(one, text), (two, text), (one, prompt(4))]):
        full = whose[: len(whose) // 4 * 4].tolist()
        expected = twins.last_block_logits(model, full + current, 4)
        assert (branches[row] - expected).abs().max() < 1e-10


def test_following_writes_the_other_runs_tokens(model: Any) -> None:
    prompts = [prompt(6), prompt(8)]
    stock = run_with(model, prompts, settings(max_new=12))
    followed = run_with(model, prompts, settings(max_new=12), "topk(k=1)", follow=stock.blocks)
    again = run_with(model, prompts, settings(max_new=12), follow=stock.blocks)
    assert shown(again) == shown(stock)
    assert shown(followed) != shown(stock)
    text = prompts[1].tolist() + stock.blocks[1][0].tolist()
    alone = run_with(model, [torch.tensor(text)], settings(max_new=4), "topk(k=1)")
    assert followed.blocks[1][1].tolist() == shown(alone)[0]
