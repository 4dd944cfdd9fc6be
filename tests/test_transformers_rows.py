"""Rows of a forward: prompt or decoding, padding, finished sequences, groups, packed requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carpool import CarpoolError, Grouping
from carpool.hosts.transformers import Known
from carpool.hosts.transformers.forward_rows import RowRules, build_batch, on_device

PAD = 0


class Cache:
    """All that a forward's rows are read from."""

    def __init__(self, length: int | torch.Tensor) -> None:
        self.length = length

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length


def batch(
    tokens: torch.Tensor,
    group: str = "batch",
    *,
    exempt_prefill: bool = True,
    known: Known | None = None,
    **kwargs: Any,
) -> Any:
    rules = RowRules(Grouping.parse(group), exempt_prefill, (PAD,))
    return build_batch(rules, (), {"input_ids": tokens, **kwargs}, known)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.arange(3, 3 + rows * length).reshape(rows, length)


def test_a_prompt_is_exempt_unless_told_otherwise() -> None:
    prompt = batch(ids(2, 3))
    assert prompt.exempt_N.all()
    assert not prompt.voter_N.any()
    assert prompt.prefill_N.all()
    shared = batch(ids(2, 3), exempt_prefill=False)
    assert not shared.exempt_N.any()
    assert shared.voter_N.all()
    assert shared.prefill_N.all(), "for decode_only"


def test_decoding_rows_vote_but_finished_sequences_do_not() -> None:
    finished = Known(finished=torch.tensor([False, True, False]))
    step = batch(torch.tensor([[5], [7], [PAD]]), known=finished, past_key_values=Cache(4))
    assert step.real_N.all()
    assert not step.exempt_N.any()
    assert step.voter_N.tolist() == [True, False, True]
    assert not step.prefill_N.any()


def test_a_pad_token_inside_a_prompt_is_no_finished_sequence() -> None:
    prompt = batch(torch.tensor([[5, PAD, 7]]), exempt_prefill=False)
    assert prompt.voter_N.all()


@pytest.mark.parametrize("kind", ["2d", "bool", "additive", "dict"])
def test_padding_on_the_left_is_not_real(kind: str) -> None:
    padding_BL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    causal_BHSL = (torch.ones(4, 4).tril().bool() & padding_BL.bool()[:, None, :]).unsqueeze(1)
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~causal_BHSL, torch.finfo(torch.float32).min)
    mask = {"2d": padding_BL, "bool": causal_BHSL, "additive": additive, "dict": {"full_attention": causal_BHSL}}[kind]
    found = batch(ids(2, 4), exempt_prefill=False, attention_mask=mask)
    assert found.real_N.tolist() == padding_BL.reshape(-1).bool().tolist()
    assert torch.equal(found.voter_N, found.real_N)
    assert torch.equal(found.exempt_N, ~found.real_N)


def test_a_mask_that_covers_the_cache_is_read_from_its_end() -> None:
    step = batch(ids(2, 1), attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), past_key_values=Cache(3))
    assert step.real_N.all()


def test_requests_are_rows_of_the_batch() -> None:
    found = batch(ids(2, 3), "request")
    assert (found.group_N.tolist(), found.num_groups) == ([0, 0, 0, 1, 1, 1], 2)


def test_positions_are_steps_and_no_prompt() -> None:
    found = batch(ids(2, 3), "position")
    assert (found.group_N.tolist(), found.num_groups) == ([0, 1, 2] * 2, 3)
    assert (found.step_N.tolist(), found.num_steps) == ([0, 1, 2] * 2, 3)
    assert found.voter_N.all()


@pytest.mark.parametrize("block", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_blocks_follow_positions(block: int, start: int) -> None:
    positions = torch.arange(start, start + 7).repeat(2, 1)
    found = batch(ids(2, 7), f"block:{block}", position_ids=positions)
    assert int(found.group_N.max()) < found.num_groups
    key = [(row, position // block) for row in range(2) for position in range(start, start + 7)]
    for i, mine in enumerate(key):
        for j, other in enumerate(key):
            assert (mine == other) == bool(found.group_N[i] == found.group_N[j])


def test_blocks_without_position_ids_count_the_cache() -> None:
    found = batch(ids(1, 3), "block:4", past_key_values=Cache(3))
    assert found.group_N[0] != found.group_N[1]
    assert found.group_N[1] == found.group_N[2]


def test_packed_requests() -> None:
    # a prompt of 3, two decoding rows, 2 rows of padding held by a sequence of length 0
    found = batch(ids(1, 7), "request", cu_seq_lens_q=torch.tensor([0, 3, 4, 5, 5], dtype=torch.int32))
    assert found.group_N.tolist()[:5] == [0, 0, 0, 1, 2]
    assert found.num_groups == 4
    assert found.real_N.tolist() == [True] * 5 + [False] * 2
    assert found.exempt_N.tolist() == [True] * 3 + [False] * 2 + [True] * 2
    assert found.voter_N.tolist() == [False] * 3 + [True] * 2 + [False] * 2


def test_packed_requests_have_no_common_positions() -> None:
    with pytest.raises(CarpoolError, match="packed"):
        batch(ids(1, 3), "position", cu_seq_lens_q=torch.tensor([0, 2, 3]))


def test_positional_ids_and_embeddings() -> None:
    rules = RowRules(Grouping.parse("batch"))
    assert len(build_batch(rules, (ids(2, 3),), {}).group_N) == 6
    assert len(build_batch(rules, (), {"inputs_embeds": torch.zeros(2, 3, 8)}).group_N) == 6
    with pytest.raises(CarpoolError, match=r"run\.batch"):
        build_batch(rules, (), {})


def test_a_batch_moves_between_devices() -> None:
    found = batch(ids(2, 1))
    assert on_device(found, torch.device("cpu")) is found
    moved = on_device(found, torch.device("meta"))
    assert moved.voter_N.is_meta
    assert moved.num_groups == found.num_groups
