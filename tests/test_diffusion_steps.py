"""Mask block diffusion: what is counted, what is accepted, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion_tools import MASK, exact_model, prompt, run_with, settings
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from carpool import CarpoolError
from carpool.diffusion import Block, Decoding, Session, generate
from carpool.diffusion.loop import predict, sure


@pytest.fixture(scope="module")
def model() -> Any:
    return exact_model()


def test_counts(model: Any) -> None:
    prompts = [prompt(6), prompt(8)]
    made = run_with(model, prompts, settings(max_new=10))
    assert made.accepted_B.tolist() == [10, 12], "a tail of two leaves two positions of the first block"
    assert made.commits == 2
    per_request = [[f for f in made.forwards if request in f.request_R.tolist()] for request in (0, 1)]
    assert made.forwards_B.tolist() == [len(one) for one in per_request]
    assert made.tokens_per_forward == pytest.approx(22 / sum(map(len, per_request)))
    assert all(len(tokens) == 10 for tokens in made.tokens)


def test_ages_of_positions(model: Any) -> None:
    ages: list[list[int]] = []
    masks: list[list[bool]] = []

    def watch(block: Block) -> None:
        ages.append(block.age_AL[0].tolist())
        masks.append(block.masked_AL[0].tolist())

    run_with(model, [prompt(2)], settings(max_new=2, threshold=1.0), watch=watch)
    assert masks[0] == [False, False, True, True]
    assert ages[0] == [0, 0, 0, 0]
    assert ages[1] == [1, 1, 0, 0], "the prompt's tail has been through one forward, the new token through none"
    assert sorted(ages[2]) == [0, 1, 2, 2]


# accepting


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=8),
    st.floats(0, 1), st.integers(1, 8),
)  # fmt: skip
def test_sure(positions: list[tuple[float, bool]], threshold: float, least: int) -> None:
    confidence = torch.tensor([[one for one, _ in positions]])
    masked = torch.tensor([[is_masked for _, is_masked in positions]])
    found = sure(confidence, masked, threshold, torch.tensor([least]))[0].nonzero().flatten().tolist()
    candidates = [place for place, (_, is_masked) in enumerate(positions) if is_masked]
    over = [place for place in candidates if float(confidence[0, place]) > threshold]
    ranked = sorted(candidates, key=lambda place: (-float(confidence[0, place]), place))
    assert found == (over if len(over) >= least else sorted(ranked[:least]))


def test_the_mask_token_is_never_predicted() -> None:
    logits = torch.zeros(1, 2, 5)
    logits[..., 3] = 9.0
    logits[0, 1, 2] = 1.0
    tokens, confidence = predict(logits, 3)
    assert tokens.tolist() == [[0, 2]]
    assert confidence[0, 0] == pytest.approx(0.25)
    assert logits[0, 0, 3] == 9.0, "the model's logits stay as they are"


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "block size 0"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"max_new": 0}, "0 new tokens"),
        ({"steps": 5}, "5 steps for blocks of 4"),
        ({"steps": 0}, "0 steps"),
        ({"mask_token": -1}, "mask token -1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CarpoolError, match=message):
        settings(**changes)


def test_what_the_configuration_does_not_say_must_be_given(model: Any) -> None:
    with pytest.raises(CarpoolError, match="--mask-token"):
        Decoding.of(model)
    with pytest.raises(CarpoolError, match="--block-size"):
        Decoding.of(model, mask_token=MASK)
    with pytest.raises(CarpoolError, match="none of the model's 64 tokens"):
        Decoding.of(model, mask_token=64, block=4)
    made = Decoding.of(model, mask_token=MASK, block=4)
    assert made.end_tokens == (2,)
    model.config.mask_token_id, model.config.block_size = 60, 8
    try:
        assert (Decoding.of(model).mask_token, Decoding.of(model).block) == (60, 8)
    finally:
        del model.config.mask_token_id, model.config.block_size


def test_sessions_that_cannot_be(model: Any) -> None:
    with pytest.raises(CarpoolError, match="no prompt"):
        Session(model, [], 4)
    with pytest.raises(CarpoolError, match="positions"):
        run_with(model, [prompt(100)], settings(max_new=100))
    with pytest.raises(CarpoolError, match="same prompts"):
        generate(Session(model, [prompt(3)], 4), [prompt(3)], settings(block=8))
    with pytest.raises(CarpoolError, match="group by request"):
        run_with(model, [prompt(3)], settings(), "des_seq(k0=1)", group="position")
    sliding = tiny_model("qwen3_moe", use_sliding_window=True, sliding_window=8)
    with pytest.raises(CarpoolError, match="sliding window of 8"):
        Session(sliding, [prompt(3)], 4)
    mixed = tiny_model("qwen3_next")
    with pytest.raises(CarpoolError, match="linear_attention"):
        Session(mixed, [prompt(3)], 4)
