"""Rows of a forward: prompt or decoding, padding, finished sequences, groups, packed requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Left padding of each sequence, the numbers of tokens that are fed, and the columns that a mask is made for."""
    columns = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    padding = draw(st.lists(st.integers(0, columns[0] - 1), min_size=1, max_size=4))
    return padding, columns, sum(columns) + draw(st.integers(0, 5))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["grown", "whole", "bool", "additive"])
@settings(max_examples=30)
@given(history=histories())
def test_padding_is_found_in_every_kind_of_mask(
    history: tuple[list[int], list[int], int], kind: str, static: bool
) -> None:
    """Against the tokens themselves, fed in any pieces: masks as long as the tokens so far or as the whole cache, for
    columns or for pairs, beside caches that know their length as a number or as a tensor."""
    padding, pieces, width = history
    real_BL = torch.tensor([[column >= pad for column in range(width)] for pad in padding])
    past = 0
    for size in pieces:
        end = past + size
        written_BL = real_BL & (torch.arange(width) < end)
        seen_BSL = (written_BL.unsqueeze(1) & torch.ones(size, width).tril(past).bool()) & real_BL[:, past:end, None]
        additive = torch.zeros(seen_BSL.shape).masked_fill(~seen_BSL, torch.finfo(torch.float32).min)
        masks = {
            "grown": written_BL[:, :end].long(), "whole": written_BL.long(), "bool": seen_BSL.unsqueeze(1),
            "additive": additive.unsqueeze(1),
        }  # fmt: skip
        length = torch.tensor(past) if static else past
        given = {"attention_mask": masks[kind], "past_key_values": Cache(length)}
        found = batch(ids(len(padding), size), **given)
        assert torch.equal(found.real_N.reshape(-1, size), real_BL[:, past:end])
        prompt = size > 1 or past == 0
        assert torch.equal(found.exempt_N, ~found.real_N | torch.tensor(prompt))
        past = end


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_samples_of_one_prompt_are_those_of_the_same_key(keys: list[int]) -> None:
    found = batch(ids(len(keys), 2), "prompt", known=Known(prompt=torch.tensor(keys)))
    group_B = found.group_N.reshape(-1, 2)[:, 0].tolist()
    assert max(group_B) < found.num_groups == len(keys)
    for i, mine in enumerate(keys):
        for j, other in enumerate(keys):
            assert (mine == other) == (group_B[i] == group_B[j])
    in_a_row = batch(ids(6, 2), "prompt", known=Known(prompt=3))
    assert in_a_row.group_N.tolist() == [0] * 6 + [1] * 6


def test_what_a_loop_says_must_fit() -> None:
    for said in ({"finished": torch.zeros(3).bool()}, {"prefill": torch.zeros(3).bool()}):
        with pytest.raises(CarpoolError, match=r"run\.known: \w+ has shape \[3\], but the forward has 2 sequences"):
            batch(ids(2, 1), known=Known(**said), past_key_values=Cache(2))
    with pytest.raises(CarpoolError, match="5 columns for 4 cached tokens and 2 more"):
        batch(ids(2, 2), attention_mask=torch.ones(2, 5), past_key_values=Cache(4))
    with pytest.raises(CarpoolError, match="cache of the type tuple does not say how many"):
        batch(ids(2, 1), past_key_values=(1, 2))


def test_prompts_may_be_said_of_each_sequence() -> None:
    """Some still read their prompts while others decode; or so many tokens of each do."""
    cache: Any = {"past_key_values": Cache(2)}
    mixed = batch(ids(2, 1), known=Known(prefill=torch.tensor([True, False])), **cache)
    assert mixed.exempt_N.tolist() == [True, False]
    first = batch(ids(2, 3), known=Known(prefill=2), **cache)
    assert first.exempt_N.tolist() == [True, True, False] * 2
    several = batch(ids(2, 3), known=Known(prefill=torch.tensor([0, 3])), **cache)
    assert several.exempt_N.tolist() == [False] * 3 + [True] * 3
    assert batch(ids(2, 1), known=Known(finished=True, prefill=False), **cache).voter_N.tolist() == [False] * 2
