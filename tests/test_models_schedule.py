"""Answering a batch model by model: each loaded once, nobody asked twice, what is finished is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_pools import Counting, answered, pool_of

from carpool import CarpoolError
from carpool.models.aggregate import aggregate, choose, combined, trials
from carpool.models.ledger import Ledger, loads_grouped, loads_one_by_one
from carpool.models.pool import Expert, Pool
from carpool.models.questions import Answer, Answers, Question
from carpool.models.recruit import Assignment
from carpool.models.schedule import answer, turns
from carpool.models.vote import vote, votes

POOL = pool_of("a", "b", "c", "d")
QUESTIONS = [Question(str(number), f"how much is {number}?") for number in range(9)]


def assigned(rows: list[list[int]]) -> Assignment:
    ids_NK = torch.tensor(rows)
    return Assignment(
        ids_NK, torch.full(ids_NK.shape, 1 / ids_NK.shape[1]).double(), torch.zeros(len(rows), dtype=torch.bool)
    )


some_rows = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=9)


@given(rows=some_rows, chunk=st.integers(1, 4))
def test_each_model_is_loaded_once_and_everybody_asked_once(rows: list[list[int]], chunk: int) -> None:
    questions, counting, ledger, answers = QUESTIONS[: len(rows)], Counting(), Ledger(), Answers()
    made = list(answer(POOL, questions, assigned(rows), counting, answers, ledger, chunk=chunk))
    wanted = {("abcd"[expert], str(row)) for row, experts in enumerate(rows) for expert in experts}
    assert sorted(counting.asked) == sorted(wanted)
    assert {(one.expert, one.id) for one in made} == {(expert, id) for id, expert in answers.by_key} == wanted
    assert len(counting.opened) == len(set(counting.opened)) == len({expert for expert, _ in wanted})
    assert ledger.loads == len(counting.opened)
    assert ledger.bytes == 10 * ledger.loads
    assert ledger.to_dict()["total"]["written"] == 2 * len(wanted)
    experts = [[POOL.experts[index] for index in sorted(set(one))] for one in rows]
    assert loads_grouped(experts).loads == ledger.loads
    naive = [loads_one_by_one(experts, resident).loads for resident in (1, 2, 4)]
    assert naive == sorted(naive, reverse=True)
    assert naive[2] == ledger.loads, "where all fit, the order is no matter"
    assert naive[0] <= len(wanted)


def test_loads_one_by_one_by_hand() -> None:
    a, b, c = POOL.experts[:3]
    assert loads_one_by_one([[a, b], [a, b], [b, a]]).loads == 5
    assert loads_one_by_one([[a, b], [c], [a]], resident=2).loads == 4
    assert loads_one_by_one([[a, b], [c], [b]], resident=2).bytes == 30


@pytest.mark.parametrize("dies", [("b", "4"), ("a", "0"), ("d", "8")])
def test_a_run_that_dies_goes_on_where_it_was(tmp_path: Path, dies: tuple[str, str]) -> None:
    path, rows = tmp_path / "answers.jsonl", [[0, 1, 3]] * 9
    first, ledger = Counting(fails_at=dies), Ledger()
    with pytest.raises(CarpoolError, match=rf"{dies[0]} failed \(out of memory\); \d+ finished answers are kept"):
        list(answer(POOL, QUESTIONS, assigned(rows), first, Answers(path), ledger, chunk=2))
    assert first.open_now == 0
    kept = Answers(path)
    second = Counting()
    list(answer(POOL, QUESTIONS, assigned(rows), second, kept, Ledger(), chunk=2))
    assert len(Answers(path).by_key) == 27
    again = set(first.asked) & set(second.asked)
    assert len(again) <= 1, "at most the chunk that was under way is asked again"
    third = Counting()
    list(answer(POOL, QUESTIONS, assigned(rows), third, Answers(path), Ledger()))
    assert third.opened == []


def test_a_line_that_was_cut_short_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    list(answer(POOL, QUESTIONS, assigned([[0]] * 9), Counting(), Answers(path), Ledger()))
    content = path.read_text()
    path.write_text(content[:-10])
    counting = Counting()
    list(answer(POOL, QUESTIONS, assigned([[0]] * 9), counting, Answers(path), Ledger()))
    assert counting.asked == [("a", "8")]
    assert path.read_text() == content


def test_answers_of_other_weights_or_questions_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    list(answer(POOL, QUESTIONS, assigned([[0]] * 9), Counting(), Answers(path), Ledger()))
    changed = pool_of("a", "b", "c", "d", max_tokens=3)
    with pytest.raises(CarpoolError, match="a has other weights or settings"):
        list(answer(changed, QUESTIONS, assigned([[0]] * 9), Counting(), Answers(path), Ledger()))
    other, counting = [Question("0", "something else")], Counting()
    list(answer(POOL, other, assigned([[0]]), counting, Answers(path), Ledger()))
    assert counting.asked == [("a", "0")]
    path.write_text(json.dumps({"id": "1"}) + "\n")
    with pytest.raises(CarpoolError, match="line 1 is no answer"):
        Answers(path)
    with pytest.raises(CarpoolError, match="does not exist"):
        Answers(tmp_path / "no" / "a.jsonl")


def test_servers_come_first_modes_share_a_load_and_the_aggregator_is_last() -> None:
    pool = Pool((
        Expert("judge", "transformers", "/no/judge"),
        Expert("slow", "transformers", "/no/m", prompt="{question} /think"),
        Expert("served", "server", "m", url="http://127.0.0.1:1/v1"),
        Expert("fast", "transformers", "/no/m"),
    ))  # fmt: skip
    pairs = [(index, one) for one in QUESTIONS[:3] for index in range(4)]
    made = turns(pool, [*pairs, (0, QUESTIONS[5])], last="judge")
    assert [turn.expert.name for turn in made] == ["served", "slow", "judge"]
    assert [expert.name for expert, _ in made[1].pairs] == ["slow"] * 3 + ["fast"] * 3
    counting, ledger = Counting(), Ledger()
    list(answer(pool, QUESTIONS[:3], assigned([[1, 2, 3]] * 3), counting, Answers(), ledger))
    assert len(counting.opened) == 2
    assert ledger.loads == 1, "a server's weights are there"


def said(text: str, finish: str = "stop", choice: int | None = None) -> Answer:
    return Answer("1", "", "a", "", text, choice, finish)


def test_votes() -> None:
    assert vote([], []) is None
    assert vote([said("4"), said(" 4\n"), said("5")], [0.3, 0.3, 0.4]).text == "4"
    assert vote([said("4", "length"), said("5")], [0.9, 0.1]).text == "5"
    assert vote([said("4", "length"), said("5", "length")], [0.9, 0.1]).text == "4"
    assert vote([said("x", choice=1), said("x", choice=2)], [0.4, 0.6]).choice == 2
    answers = Answers()
    list(answer(POOL, QUESTIONS[:2], assigned([[0, 0, 1], [2, 2, 2]]), Counting(), answers, Ledger()))
    found = votes(POOL, QUESTIONS[:3], assigned([[0, 0, 1], [2, 2, 2], [1, 1, 1]]), answers)
    assert [one and one.expert for one in found] == ["a", "c", None]


class Judge(Counting):
    """As an aggregator `b` finds the right answer wherever it is told, `a` takes the first it is told."""

    def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
        made = []
        for one, plain in zip(questions, super().answer(expert, questions), strict=True):
            told = [line.partition(": ")[2] for line in one.question.split("\n\n") if line.startswith("Answer ")]
            text = "yes" if expert.name == "b" and "yes" in told else told[0]
            made.append(dataclasses.replace(plain, text=text))
        return made


def test_an_aggregator_is_chosen_on_one_right_and_two_wrong_answers() -> None:
    pool = pool_of("a", "b", "c", "d")
    questions = [Question(str(n), "?", answer="yes") for n in range(40)]
    rights = {name: [n % 4 == place for n in range(40)] for place, name in enumerate("abcd")}
    rights["a"][0] = rights["b"][0] = rights["c"][0] = rights["d"][0] = True  # nobody is wrong: no item
    answers = answered(pool, questions, rights)
    assert len(trials(pool, questions, answers)) == 39
    found = choose(pool, questions, answers, Judge(), Ledger())
    assert next(iter(found)) == "b"
    assert found["b"] == 1
    assert 0.1 < found["a"] < 0.6
    everybody = assigned([[0, 1, 2, 3]] * 40)
    judge, ledger = Judge(), Ledger()
    final = aggregate(pool, "b", questions, everybody, answers, judge, ledger)
    assert [one.text for one in final] == ["yes"] * 40
    assert [one.id for one in final] == [one.id for one in questions]
    assert ledger.loads == 1
    aggregate(pool, "b", questions, everybody, answers, judge, ledger)
    assert ledger.loads == 1, "its answers are kept"
    with pytest.raises(CarpoolError, match="no question has a right and two wrong"):
        choose(pool, questions[:1], answers, judge, ledger)


def test_answers_that_were_cut_short_are_not_read_out() -> None:
    made = combined(Question("1", "how much?"), [said("4"), said("5 is", "length")])
    assert made.question == "how much?\n\nAnswer 1: 4\n\nFinal answer:"
