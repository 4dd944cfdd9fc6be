"""TEAM's decoding: against a slow twin, its parts alone, batches, and what it may not do."""

from __future__ import annotations

from typing import Any

import pytest
import team_twin
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from carpool import Batch, CarpoolError, share
from carpool.diffusion import Block, Decoding, Forward, Generation, Session, generate
from carpool.diffusion.outputs import Outputs
from carpool.diffusion.team import Team, TeamCold, choose, ranks

MASK, TOP_K, EXPERTS = 63, 2, 8
DECODING = Decoding(block=8, mask_token=MASK, threshold=0.4, max_new=20)
COLD = TeamCold(confidence=0.3, near=0)
NATIVE = f"des_seq(k0={TOP_K})"


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64, so that two ways to the same logits choose the same tokens."""
    return tiny_model("qwen3_moe", dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager")


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, MASK, (length,), generator=torch.Generator().manual_seed(100 * seed + length))


def run_with(
    model: Any, prompts: list[torch.Tensor], plan: str = NATIVE, decoding: Decoding = DECODING,
    observe: Any = None, **given: Any,
) -> Generation:  # fmt: skip
    with share(model, plan, group="request", observe=observe) as run:
        return generate(Session(model, prompts, decoding.block, run=run), prompts, decoding, **given)


def shown(generation: Generation) -> list[list[int]]:
    return [tokens.tolist() for tokens in generation.tokens]


@pytest.mark.parametrize("length", [3, 13])
@pytest.mark.parametrize(
    ("cold", "reuse", "branches", "plan"),
    [
        (COLD, True, True, NATIVE),
        (COLD, True, True, "des_vote(size=3)"),
        (COLD, False, False, NATIVE),
        (None, True, False, NATIVE),
        (None, False, True, NATIVE),
        (COLD, False, True, NATIVE),
    ],
)
def test_it_decodes_as_the_twin(
    model: Any, length: int, cold: TeamCold | None, reuse: bool, branches: bool, plan: str
) -> None:
    votes: list[int] = []

    def observe(place: int, batch: Batch, _: Any) -> None:
        if place == 0 and not bool(batch.exempt_N.all()):
            votes.append(int(batch.voter_N.sum()))

    made = run_with(model, [prompt(length)], plan, observe=observe, step=Team(cold, reuse=reuse, branches=branches))
    with share(model, plan) as run:
        twin = team_twin.decode(
            model, prompt(length).tolist(), block=8, mask=MASK, threshold=DECODING.threshold, max_new=20, run=run,
            cold=None if cold is None else (cold.confidence, cold.near), reuse=reuse, branches=branches,
        )  # fmt: skip
    assert shown(made) == [twin.tokens]
    assert [int(forward.accepted_RL.sum()) for forward in made.forwards] == twin.accepted
    assert votes == twin.voters


def test_the_twins_saw_every_branch_and_cold_rows(model: Any) -> None:
    """Or the comparison above would say little."""
    seen: set[str] = set()
    voters: set[int] = set()
    with share(model, NATIVE) as run:
        for length in (3, 13):
            twin = team_twin.decode(
                model, prompt(length).tolist(), block=8, mask=MASK, threshold=DECODING.threshold, max_new=20, run=run,
                cold=(COLD.confidence, COLD.near), reuse=False, branches=True,
            )  # fmt: skip
            seen |= set(twin.chosen)
            voters |= set(twin.voters)
    assert seen >= {"as it is", "both"}
    assert seen & {"first", "second"}
    assert any(count % 32 for count in voters), "somebody was cold"


def test_without_its_parts_it_is_the_plain_step(model: Any) -> None:
    prompts = [prompt(3), prompt(9, 1)]
    plain = run_with(model, prompts)
    team = run_with(model, prompts, step=Team(None, reuse=False, branches=False))
    assert shown(team) == shown(plain)
    assert len(team.forwards) == len(plain.forwards)
    voters = run_with(model, prompts, voters=COLD)
    step = run_with(model, prompts, step=Team(COLD, reuse=False, branches=False))
    assert shown(step) == shown(voters)


@pytest.mark.parametrize("cold", [COLD, None])
def test_a_request_decodes_alike_beside_others(model: Any, cold: TeamCold | None) -> None:
    prompts = [prompt(3), prompt(9, 1), prompt(16, 2)]
    together = run_with(model, prompts, step=Team(cold))
    alone = [run_with(model, [one], step=Team(cold)) for one in prompts]
    assert shown(together) == [shown(one)[0] for one in alone]
    assert together.forwards_B.tolist() == [len(one.forwards) for one in alone]


def test_cold_rows_read_only_what_voters_choose(model: Any) -> None:
    fewer: list[bool] = []

    def observe(place: int, batch: Batch, outcome: Any) -> None:
        if bool(batch.exempt_N.all()):
            return
        voted_GE = batch.group_any(outcome.inputs.native_NE & batch.voter_N.unsqueeze(-1))
        read_GE = batch.group_any(outcome.computed_NE)
        assert not (read_GE & ~voted_GE).any()
        assert torch.equal(outcome.changed_N & batch.voter_N, torch.zeros_like(batch.voter_N)), "voters are native"
        fewer.append(bool((outcome.union_SE.sum() < outcome.natural_SE.sum()).item()))

    run_with(model, [prompt(8)], observe=observe, voters=COLD)
    assert any(fewer)


def test_rows_that_rest_are_not_computed(model: Any) -> None:
    rows: list[int] = []

    def observe(place: int, batch: Batch, _: Any) -> None:
        if place == 0 and not bool(batch.exempt_N.all()):
            rows.append(len(batch.group_N))

    made = run_with(model, [prompt(8)], observe=observe, step=Team(None, branches=False))
    ages, expected = torch.zeros(8, dtype=torch.int64), []
    for number, forward in enumerate(made.forwards):
        if number and forward.block != made.forwards[number - 1].block:
            ages.zero_()
        expected.append(8 - int((ages > 0).sum()))
        ages += ~forward.masked_RL[0]
    assert rows == expected
    assert min(rows) < 8


def block_of(masked: list[bool], confidence: list[float], steps: int = 1) -> Block:
    tokens_AL = torch.where(torch.tensor([masked]), MASK, 5)
    block = Block(0, torch.tensor([0]), tokens_AL, torch.tensor([masked]))
    block.confidence_AL = torch.tensor([confidence])
    block.steps_A += steps
    return block


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=16)), min_size=1, max_size=12), st.integers(0, 4))
def test_cold_is_what_the_paper_says(places: list[tuple[bool, float]], near: int) -> None:
    masked, confidence = (list(part) for part in zip(*places, strict=True))
    found = TeamCold(confidence=0.5, near=near, surest=1)(block_of(masked, confidence), [0])[0].tolist()
    missing = [i for i, one in enumerate(masked) if one]
    best = min(missing, key=lambda i: (-confidence[i], i), default=None)
    for i, one in enumerate(masked):
        close = any(abs(i - j) <= near for j, other in enumerate(masked) if not other)
        assert found[i] == (not one or confidence[i] >= 0.5 or close or i == best)
    assert TeamCold(confidence=1.0, near=0, surest=0)(block_of(masked, confidence, 0), [0]).all(), "the first forward"


def test_branches_are_chosen_as_the_paper_says() -> None:
    """All 64 ways in which four branches may confirm two guesses."""
    rank_RL = torch.tensor([[1, 0, 2]])  # the second position is the surest
    tried_FL = torch.tensor([[False] * 3, [False, True, False], [True, False, False], [True, True, False]])
    for ways in range(64):
        one, two, two_with_one, one_with_two, *_ = [bool(ways >> bit & 1) for bit in range(6)]
        confirmed_FL = torch.tensor(
            [[two, one, True], [two_with_one, False, True], [False, one_with_two, True], [bool(ways & 16)] * 3]
        )
        chosen = int(choose(torch.zeros(4, dtype=torch.int64), tried_FL, rank_RL, confirmed_FL))
        if (one and (two or two_with_one)) or (two and (one or one_with_two)):
            assert chosen == 3
        else:
            assert chosen == (1 if one else 2 if two else 0)


def test_ranks() -> None:
    assert ranks(torch.tensor([[True, True, False, True]]), torch.tensor([[0.2, 0.9, 1.0, 0.2]])).tolist() == [
        [1, 0, 3, 2]
    ]


def test_a_batch_of_some_rows() -> None:
    batch = Batch.of(
        4, group_N=torch.tensor([0, 1, 1, 0]), num_groups=2, voter_N=torch.tensor([True, False, True, True])
    )
    some = batch.take(torch.tensor([False, True, True, False]))
    assert (some.group_N.tolist(), some.num_groups, some.voter_N.tolist()) == ([1, 1], 2, [False, True])
    assert some.request_N is None


@pytest.mark.parametrize("given", [{"confidence": 1.5}, {"confidence": -0.1}, {"near": -1}, {"surest": -1}])
def test_bad_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(CarpoolError, match=f"{next(iter(given))} .*: give "):
        TeamCold(**given)


def test_blocks_whose_output_cannot_be_kept_are_refused() -> None:
    gemma = tiny_model("gemma4_text")
    with (
        pytest.raises(CarpoolError, match="in no block of their own"),
        Outputs().reused(gemma, [0], torch.ones(1, 4) > 0),
    ):
        pass


def test_forwards_are_recorded_with_their_guesses(model: Any) -> None:
    made = run_with(model, [prompt(8)], step=Team())
    assert all(isinstance(forward, Forward) for forward in made.forwards)
    for forward in made.forwards:
        assert not (forward.accepted_RL & ~forward.masked_RL).any()
    assert int(made.accepted_B) == made.blocks[0].numel()
