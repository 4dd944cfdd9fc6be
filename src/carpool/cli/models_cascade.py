"""`carpool models cascade`: a weak answer stands where it may."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.models_common import (
    AnswerFile,
    PoolFile,
    QuestionFile,
    answer_lines,
    group,
    open_answers,
    open_pool,
    open_questions,
    opening,
    show_ledger,
)
from carpool.cli.table import say
from carpool.errors import CarpoolError


@command("models cascade", group)
def cascade(
    pool: PoolFile,
    questions: QuestionFile,
    weak: Annotated[str, typer.Option(help="The cheap expert, or the fast mode.")],
    strong: Annotated[str, typer.Option(help="The dear expert, or the slow mode.")],
    max_loss: Annotated[float, typer.Option(help="Share of right answers that may be lost.")] = 0.01,
    max_tokens: Annotated[
        float | None, typer.Option(help="Instead: tokens that the strong one may write, a mean over all questions.")
    ] = None,
    signal: Annotated[list[str] | None, typer.Option(help="Signal of the weak answer; may be repeated.")] = None,
    gate: Annotated[
        Path | None, typer.Option(help="Use this gate; default: calibrate one, for which both answer all questions.")
    ] = None,
    answers: AnswerFile = Path("cascade-answers.jsonl"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="What to write: gate.json, or with --gate answers.jsonl.")
    ] = None,
) -> None:
    """Let a weak answer stand where it may: calibrate a gate, or with --gate answer a batch through it."""
    from carpool.artefacts.files import require_writable, write_text
    from carpool.models.cascade import asked as ask_one
    from carpool.models.cascade import calibrate
    from carpool.models.cascade import cascade as run
    from carpool.models.gate import Gate
    from carpool.models.ledger import Ledger

    target = output or Path("gate.json" if gate is None else "answered.jsonl")
    require_writable(target, ".json" if gate is None else ".jsonl")
    experts, asked, kept, ledger = open_pool(pool), open_questions(questions), open_answers(answers), Ledger()
    names = signal or ["margin"]
    given = None if gate is None else Gate.load(gate)
    if experts[weak] == experts[strong]:
        raise CarpoolError(f"--weak and --strong are both {weak}; name two experts")
    console = Console()
    with opening(2 * len(asked)) as opened:
        if given is None:
            for name in (weak, strong):
                ask_one(experts, name, asked, opened, kept, ledger)
            made = calibrate(
                experts, weak, strong, asked, kept, signals=names, max_loss=max_loss, max_tokens=max_tokens
            )
            made.save(target)
        else:
            found = run(experts, weak, strong, asked, given, opened, kept, ledger, signals=names)
            write_text(target, answer_lines(asked, found.final))
    show_ledger(console, ledger)
    if gate is None:
        say(
            console,
            f"{weak} answers {made.kept:.1%} of the questions at {made.loss:+.2%} of right answers lost; held out, the "
            f"gate is {made.gain:+.2%} above a random choice at equal cost (standard error {made.error:.2%})",
        )
    else:
        say(
            console,
            f"{strong} was asked {int(found.passed_N.sum())} of {len(asked)} questions; {found.written} tokens written",
        )
    say(console, f"wrote {target}")
