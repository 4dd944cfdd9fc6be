"""What the commands of `carpool models` share: the group, its files, asking with a progress bar, the ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from carpool.cli.app import app
from carpool.cli.common import progress
from carpool.cli.table import Column, Row, print_table, say

if TYPE_CHECKING:
    from carpool.models.ledger import Ledger
    from carpool.models.pool import Expert, Pool
    from carpool.models.questions import Answer, Answers, Question
    from carpool.models.schedule import Open

group = typer.Typer(
    name="models", help="Experts that are whole models: a pool of them answers a batch.", no_args_is_help=True
)
app.add_typer(group)
WORD, TEXT = (partial(Column, kind=kind) for kind in ("word", "text"))
MB = 1e6

PoolFile = Annotated[Path, typer.Argument(metavar="POOL", help="TOML file with an [[expert]] for each model.")]
QuestionFile = Annotated[
    Path, typer.Option("--questions", "-q", help="JSON lines: id, question, answer, skills, choices")
]
AnswerFile = Annotated[
    Path, typer.Option("--answers", "-a", help="JSON lines of answers; what is there already is not asked again.")
]


def open_pool(path: Path) -> Pool:
    from carpool.models.pool import Pool

    return Pool.load(path)


def open_questions(path: Path) -> list[Question]:
    from carpool.models.questions import load_questions

    return load_questions(path)


def open_answers(path: Path) -> Answers:
    from carpool.models.questions import Answers

    return Answers(path)


@contextmanager
def opening(total: int) -> Iterator[Open]:
    """Opens runners whose answers move a progress bar."""
    from carpool.models.runners import open_runner

    with progress("asking", total) as bar:

        class Shown:
            def __init__(self, runner: Any) -> None:
                self.runner = runner

            def answer(self, expert: Expert, questions: Sequence[Question]) -> list[Answer]:
                made = self.runner.answer(expert, questions)
                bar(len(made))
                return made

        @contextmanager
        def shown(expert: Expert) -> Iterator[Any]:
            with open_runner(expert) as runner:
                yield Shown(runner)

        yield shown


def ask_all(pool: Pool, questions: Sequence[Question], rows: Sequence[Sequence[int]], kept: Answers) -> Ledger:
    """Ask each question's experts, model by model, for what is not kept yet."""
    from carpool.models.ledger import Ledger
    from carpool.models.schedule import ask, turns, unasked

    ledger, pairs = Ledger(), unasked(pool, questions, rows, kept)
    with opening(len(pairs)) as opened:
        for _ in ask(turns(pool, pairs), opened, kept, ledger):
            pass
    return ledger


def show_ledger(console: Console, ledger: Ledger) -> None:
    columns = [
        TEXT("model"), Column("loads"), Column("MB read"), Column("questions"), Column("tokens read", rank=1),
        Column("written", rank=1), Column("seconds to load", rank=2), Column("to answer", rank=2),
    ]  # fmt: skip
    rows = [
        Row([
            weights[1], str(one.loads), megabytes(one.bytes), str(one.questions), str(one.read), str(one.written),
            f"{one.load_seconds:.1f}", f"{one.answer_seconds:.1f}",
        ])
        for weights, one in ledger.accounts.items()
    ]  # fmt: skip
    if rows:
        print_table(console, columns, rows)
    else:
        say(console, "all answers were there already; no model was loaded")


def show_orders(console: Console, asked: Sequence[Sequence[Expert]]) -> None:
    from carpool.models.ledger import loads_grouped, loads_one_by_one

    grouped, single = loads_grouped(asked), loads_one_by_one(asked)
    say(
        console,
        f"model by model: {grouped.loads} loads, {megabytes(grouped.bytes)} MB; question by question, one model at a "
        f"time: {single.loads} loads, {megabytes(single.bytes)} MB",
    )


def answer_lines(questions: Sequence[Question], answers: Sequence[Answer | None]) -> str:
    rows: list[dict[str, Any]] = []
    for one, said in zip(questions, answers, strict=True):
        row: dict[str, Any] = {"id": one.id, "answer": None, "expert": None}
        if said is not None:
            row |= {"answer": said.text if said.choice is None else said.choice, "expert": said.expert}
        rows.append(row)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def megabytes(size: int) -> str:
    return f"{size / MB:,.1f}"
