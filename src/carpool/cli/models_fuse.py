"""`carpool models fuse`: a router writes, and one expert of the pool complements it at each token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import progress, require_number
from carpool.cli.models_common import PoolFile, QuestionFile, group, open_answers, open_pool, open_questions
from carpool.cli.table import say
from carpool.errors import CarpoolError


@command("models fuse", group)
def fuse(
    pool: PoolFile,
    questions: QuestionFile,
    router: Annotated[str, typer.Option(help="The expert of the pool that writes; the others complement it.")],
    head: Annotated[Path, typer.Option(help="The router's head (safetensors), a row an expert in the pool's order.")],
    plan: Annotated[
        str, typer.Option(help="Which experts a step may read: 'xshare(2, warmup=0) | regret(0.1)'.")
    ] = "topk(k=1)",
    switch_cost: Annotated[
        float, typer.Option(help="Taken from an expert's score for each token it would read late.")
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="Texts that are written together.")] = 8,
    answers: Annotated[
        Path, typer.Option("--answers", "-a", help="JSON lines to write; what is there already is not asked again.")
    ] = Path("fused.jsonl"),
) -> None:
    """Write answers with a router whose logits one expert a token complements (FusionRoute); transformers only."""
    require_number("--batch", batch, 1, 4096)
    from carpool.models.check import facts
    from carpool.models.fused_answers import Fuser

    experts, asked, kept = open_pool(pool), open_questions(questions), open_answers(answers)
    found = facts(experts)
    if found["fusion"].startswith("no"):
        raise CarpoolError(f"this pool cannot be fused: {found['fusion'].removeprefix('no, ')}")
    fuser = Fuser(experts, router, head, plan, switch_cost)
    kept.require_current({fuser.name: fuser.fingerprint})
    missing = [one for one in asked if kept.of(one, fuser.name) is None]
    console = Console()
    if missing:
        with progress("writing", len(missing)) as bar, fuser as open_fuser:
            for start in range(0, len(missing), batch):
                made = open_fuser.answer(missing[start : start + batch])
                kept.add(made)
                bar(len(made))
        say(console, str(fuser.report))
    say(console, f"{len(asked)} answers in {answers}, {len(missing)} of them new")
