"""`carpool models check|profile|answer`: experts that are whole models, and which of them answers what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.models_common import (
    TEXT,
    WORD,
    AnswerFile,
    PoolFile,
    QuestionFile,
    answer_lines,
    ask_all,
    group,
    megabytes,
    open_answers,
    open_pool,
    open_questions,
    opening,
    show_ledger,
    show_orders,
)
from carpool.cli.options import ShowJson
from carpool.cli.table import Column, Row, print_table, say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.models.questions import Answer

ProfileFile = Annotated[Path, typer.Option("--profile", "-p", help="Made by `carpool models profile`.")]


@command("models check", group)
def check(pool: PoolFile, as_json: ShowJson = False) -> None:
    """What a pool holds, before any weights are read: sizes, tokenizers, servers that answer."""
    from carpool.models.check import facts

    found = facts(open_pool(pool))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console()
    columns = [
        WORD("expert"), WORD("engine"), TEXT("model"), Column("MB", "of weights"),
        WORD("tokenizer", "the first letters of its hash; experts that are fused token by token share one", rank=1),
        TEXT("ready"),
    ]  # fmt: skip
    rows = [
        Row(
            [
                one["name"],
                one["engine"],
                one["model"],
                megabytes(one["bytes"]),
                one["tokenizer"][:8] or "-",
                one["ready"],
            ]
        )
        for one in found["experts"]
    ]
    print_table(console, columns, rows)
    say(console, f"{found['loads']} models to load for {len(rows)} experts, {megabytes(found['bytes'])} MB in all")
    say(console, "fusion token by token: " + found["fusion"])
    if any(one["ready"] != "yes" for one in found["experts"]):
        raise typer.Exit(1)


@command("models profile", group)
def profile(
    pool: PoolFile,
    questions: QuestionFile,
    answers: AnswerFile = Path("profile-answers.jsonl"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write (.json).")] = Path("profile.json"),
) -> None:
    """Ask every expert every question, and write which skills each is good at (Symbolic-MoE)."""
    from carpool.artefacts.files import require_writable
    from carpool.models.profile import Profile

    require_writable(output, ".json")
    experts, asked, kept = open_pool(pool), open_questions(questions), open_answers(answers)
    if not any(one.skills for one in asked):
        raise CarpoolError(f'no question of {questions} names a skill; add "skills" to them')
    ledger = ask_all(experts, asked, [list(range(len(experts)))] * len(asked), kept)
    made = Profile.of(experts, asked, kept)
    made.save(output)
    console = Console()
    rows = []
    for place, name in enumerate(made.experts):
        best = sorted(zip(made.balance_ES[place], made.skills, strict=True), reverse=True)[:3]
        rows.append(
            Row([name, f"{made.right_E[place]:.1%}", ", ".join(f"{skill} {value:+d}" for value, skill in best)])
        )
    print_table(console, [WORD("expert"), Column("right"), TEXT("best skills", "right less wrong answers")], rows)
    show_ledger(console, ledger)
    say(console, f"wrote {output}")


@command("models answer", group)
def answer(
    pool: PoolFile,
    questions: QuestionFile,
    profile: Annotated[Path, typer.Option("--profile", "-p", help="Profile of `carpool models profile`.")] = Path(
        "profile.json"
    ),
    plan: Annotated[
        str, typer.Option(help="paper, repository, top1, best, random, or a plan: 'xshare(2, warmup=0) | regret(0.1)'.")
    ] = "paper",
    recruits: Annotated[int, typer.Option(help="Experts of a question.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    aggregator: Annotated[
        str | None, typer.Option(help="Expert that reads all recruits' answers and decides; default: a vote.")
    ] = None,
    answers: AnswerFile = Path("answers.jsonl"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Voted answers to write (.jsonl).")] = None,
) -> None:
    """Answer a batch: recruit experts for each question, load each model once, vote."""
    from carpool.artefacts.files import require_writable, write_text
    from carpool.models.aggregate import aggregate
    from carpool.models.profile import Profile
    from carpool.models.questions import is_right
    from carpool.models.recruit import recruit
    from carpool.models.vote import votes

    if output is not None:
        require_writable(output, ".jsonl")
    experts, asked, kept = open_pool(pool), open_questions(questions), open_answers(answers)
    known = Profile.load(profile)
    known.require_current(experts)
    if aggregator is not None:
        experts.index(aggregator)
    assignment = recruit(plan, known, asked, recruits=recruits, seed=seed)
    rows = [assignment.asked(row) for row in range(len(asked))]
    ledger = ask_all(experts, asked, rows, kept)
    final: list[Answer | None] = votes(experts, asked, assignment, kept)
    if aggregator is not None:
        with opening(len(asked)) as opened:
            final = [*aggregate(experts, aggregator, asked, assignment, kept, opened, ledger)]
    console = Console()
    show_ledger(console, ledger)
    show_orders(console, [[experts.experts[index] for index in row] for row in rows])
    if assignment.empty_N.any():
        say(
            console,
            f"{int(assignment.empty_N.sum())} questions name no skill of the profile; they went by overall competence",
        )
    if all(one.answer is not None for one in asked):
        right = sum(said is not None and is_right(one, said) for one, said in zip(asked, final, strict=True))
        say(console, f"right: {right} of {len(asked)} ({right / len(asked):.1%}), experts used: {len(assignment.used)}")
    if output is not None:
        write_text(output, answer_lines(asked, final))
        say(console, f"wrote {output}")
