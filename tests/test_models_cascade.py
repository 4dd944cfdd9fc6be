"""Cascades and modes: one batch of each, `always` is one expert alone, loops are found where they are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_pools import Counting, pool_of

from carpool import CarpoolError
from carpool.models.cascade import calibrate, cascade, signals_of
from carpool.models.gate import Gate
from carpool.models.ledger import Ledger
from carpool.models.modes import PromptSelector, RepetitionRepair, loop_at_end
from carpool.models.pool import Expert, Pool
from carpool.models.questions import Answer, Answers, Question

MODES = Pool((
    Expert("fast", "transformers", "/no/m", prompt="{question} /no_think"), Expert("slow", "transformers", "/no/m"),
))  # fmt: skip
HARD = 60
QUESTIONS = [Question(str(n), "hard one" if n < HARD else "easy", answer="yes") for n in range(200)]


class Sure(Counting):
    """The fast mode is wrong and unsure on hard questions; slow answers are right and long."""

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        super().answer(expert, questions)
        made = []
        for one in questions:
            slow, hard = expert.name == "slow", int(one.id) < HARD
            right, written = ("yes", 40) if slow else ("no" if hard else "yes", 4)
            margin = (0.2 if hard else 0.8) + int(one.id) / 2000
            made.append(
                Answer(
                    one.id, one.hash, expert.name, expert.fingerprint, right, written=written,
                    confidence={"margin": margin, "mean": 0.5},
                )
            )  # fmt: skip
        return made


def both_answered() -> Answers:
    answers = Answers()
    for expert in MODES.experts:
        answers.add(Sure().answer(expert, QUESTIONS))
    return answers


GATE = calibrate(MODES, "fast", "slow", QUESTIONS, both_answered(), signals=["margin"], max_loss=0.0)


def test_the_slow_mode_is_asked_what_needs_it_in_one_batch() -> None:
    counting, ledger = Sure(), Ledger()
    made = cascade(MODES, "fast", "slow", QUESTIONS, GATE, counting, Answers(), ledger, signals=["margin"])
    assert [one.text for one in made.final] == ["yes"] * 200
    assert made.passed_N.tolist() == [n < HARD for n in range(200)]
    assert made.written == 200 * 4 + HARD * 40
    names = [name for name, _ in counting.asked]
    assert names == ["fast"] * 200 + ["slow"] * HARD
    assert len(counting.opened) == 2


@pytest.mark.parametrize(("always", "name"), [("weak", "fast"), ("strong", "slow")])
def test_always_is_one_mode_alone(always: str, name: str) -> None:
    counting = Sure()
    made = cascade(MODES, "fast", "slow", QUESTIONS, None, counting, Answers(), Ledger(), always=always)
    assert {one.expert for one in made.final} == {one for one, _ in counting.asked} == {name}
    assert made.final == Sure().answer(MODES[name], QUESTIONS)
    assert bool(made.passed_N.all()) == (always == "strong")


def test_a_budget_of_tokens_is_kept() -> None:
    gate = calibrate(MODES, "fast", "slow", QUESTIONS, both_answered(), signals=["margin"], max_tokens=10)
    made = cascade(MODES, "fast", "slow", QUESTIONS, gate, Sure(), both_answered(), Ledger(), signals=["margin"])
    slow = made.written - 200 * 4
    assert 9 * 200 < slow <= 10 * 200


def test_what_a_cascade_refuses() -> None:
    with pytest.raises(CarpoolError, match="takes a gate, or always"):
        cascade(MODES, "fast", "slow", QUESTIONS, GATE, Sure(), Answers(), Ledger(), always="weak")
    with pytest.raises(CarpoolError, match="no signal 'peak' in these answers; there are margin, mean"):
        signals_of(Sure().answer(MODES["fast"], QUESTIONS), ["peak"])
    answers = Answers()
    answers.add(Sure().answer(MODES["fast"], QUESTIONS))
    with pytest.raises(CarpoolError, match="slow has not answered all"):
        calibrate(MODES, "fast", "slow", QUESTIONS, answers, signals=["margin"])
    with pytest.raises(CarpoolError, match="leaves all to the weak model"):
        calibrate(MODES, "fast", "slow", QUESTIONS, both_answered(), signals=["mean"], max_tokens=10)
    with pytest.raises(CarpoolError, match="no expert 'slower'"):
        cascade(pool_of("a"), "slower", "a", QUESTIONS, GATE, Sure(), Answers(), Ledger(), signals=["margin"])


def test_a_prompt_selector_looks_beyond_length() -> None:
    """Hard prompts are as long as easy ones, but for a word."""
    prompts = [f"{'divide' if n % 2 else 'repeat'} {n % 7}" for n in range(80)]
    fine_N = torch.arange(80) % 2 == 0
    signal_N = PromptSelector.fit(prompts, fine_N).signal(prompts)
    assert signal_N[fine_N].min() > signal_N[~fine_N].max()
    control_N = PromptSelector.fit(prompts, fine_N, length_only=True).signal(prompts)
    assert float(control_N.max() - control_N.min()) < 0.01
    Gate.calibrate(signal_N, fine_N, fine_N | True, max_loss=0.0)
    with pytest.raises(CarpoolError, match="prompts of both kinds"):
        PromptSelector.fit(prompts, fine_N | True)


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(2, 4), st.integers(1, 8))
def test_loops_are_found_as_by_looking(ids: list[int], times: int, least: int) -> None:
    found = loop_at_end(ids, times=times, least=least)
    periods = [
        p
        for p in range(1, 25)
        if p * times >= least and ids[-p * times :] == ids[-p:] * times and p * times <= len(ids)
    ]
    assert (found and found.period) == (min(periods) if periods else None)


@given(st.permutations(range(40)))
def test_text_without_a_repetition_is_left_alone(ids: list[int]) -> None:
    repair = RepetitionRepair([7], 0)
    scores = torch.randn(1, 50)
    for length in range(1, 41):
        assert torch.equal(repair(torch.tensor([ids[:length]]), scores.clone()), scores)


def test_a_planted_loop_is_broken() -> None:
    """A model that repeats its last three tokens for ever; the prompt may loop."""
    prompt = [1, 2, 1, 2, 1, 2, 1, 2]
    repair, ids = (
        RepetitionRepair([8, 9], len(prompt), times=3, least=9),
        torch.tensor([[*prompt, 3, 4, 5], [*prompt, 3, 6, 7]]),
    )
    for step in range(20):
        scores = torch.zeros(2, 10)
        scores[0, int(ids[0, -3])] = 5
        scores[1, 3 + (0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 0, 3, 1, 4, 2, 2, 1, 0, 4, 3)[step]] = 5
        ids = torch.cat([ids, repair(ids, scores).argmax(-1, keepdim=True)], dim=1)
    new = ids[0, len(prompt) :].tolist()
    assert new[:11] == [3, 4, 5, 3, 4, 5, 3, 4, 5, 8, 9]
    assert len(repair.begun[0]) == 2, "once more, since it went on in another loop; then it is let be"
    assert repair.begun[1] == []
    with pytest.raises(CarpoolError, match="without tokens"):
        RepetitionRepair([], 0)
