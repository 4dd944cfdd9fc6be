"""`carpool diffuse`: a block diffusion model denoises text beside itself under a policy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from carpool.cli.app import command
from carpool.cli.block_diffusion import THRESHOLD, diffusion_model
from carpool.cli.common import load
from carpool.cli.options import BlockSize, MaskToken
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.diffusion import Block, Generation
    from carpool.evaluate.generations import Reads

PROMPT = "def read_lines(path):\n"


@command("diffuse")
def diffuse(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name of a block diffusion model; default: the demo's.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to go on from; repeat it for a batch.")
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="'des_vote(beta=0.3)', with guards if you like.")
    ] = "des_vote(beta=0.3)",
    group: Annotated[str, typer.Option(help="Rows that share a coreset: request, batch or block:n.")] = "request",
    max_new: Annotated[int, typer.Option("--max-new", help="Tokens to generate for each prompt.")] = 64,
    block_size: BlockSize = None,
    threshold: Annotated[float, typer.Option(help="Probability from which a prediction is accepted.")] = THRESHOLD,
    steps: Annotated[int | None, typer.Option(help="Most forwards of a block; default: its size.")] = None,
    mask_token: MaskToken = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after an end token.")] = False,
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of `carpool calibrate`, for policies with needs.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="No redrawing; so it is where the output is no terminal.")
    ] = False,
) -> None:
    """Denoise the same prompts stock and under a policy, side by side."""
    import torch

    from carpool.cli.denoising_view import Film, block_lines, text_of, view
    from carpool.diffusion import Decoding
    from carpool.evaluate.generations import decode_plan
    from carpool.evaluate.study import describe
    from carpool.plans.grammar import parse
    from carpool.routing.batch import Grouping

    console = Console()
    plan, grouping = parse(policy), Grouping.parse(group)
    prompts = prompt or [PROMPT]
    loaded, tokenizer, statistics = load(diffusion_model(model), stats, [plan])
    given = {"end_tokens": ()} if ignore_end else {}
    decoding = Decoding.of(
        loaded, mask_token=mask_token, block=block_size, threshold=threshold, max_new=max_new, steps=steps, **given
    )  # fmt: skip
    ids = [torch.tensor(tokenizer(one, add_special_tokens=False)["input_ids"], dtype=torch.int64) for one in prompts]
    if any(decoding.mask_token in one.tolist() for one in ids):
        raise CarpoolError("a prompt holds the mask token; leave it out")
    live = console.is_terminal and not plain
    names, films = ("stock", str(plan)), [Film(ids, max_new) for _ in range(2)]

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens))

    def shown(ended: bool) -> Any:
        last = [len(film.frames) - 1 for film in films]
        # while the second run denoises, the first is shown as it was after as many forwards
        at = [last[0] if ended or last[1] < 0 else min(last), last[1]]
        frames = [film.frames[place] if film.frames else None for film, place in zip(films, at, strict=True)]
        counts = [film.forwards[place] if film.frames else 0 for film, place in zip(films, at, strict=True)]
        return view(names, prompts, frames, counts, decode)

    made: list[tuple[Generation, Reads]] = []
    with Live(console=console, auto_refresh=False) if live else nullcontext() as screen:
        for film, one in zip(films, (describe(loaded).stock, plan), strict=True):

            def watch(block: Block, film: Film = film) -> None:
                film.take(block)
                if screen is not None:
                    screen.update(shown(ended=False), refresh=True)

            made.append(decode_plan(loaded, one, ids, decoding, group=grouping, stats=statistics, watch=watch))
            film.end(made[-1][0])
        if screen is not None:
            screen.update(shown(ended=True), refresh=True)
    if not live:
        for name, film, (generation, _) in zip(names, films, made, strict=True):
            console.print(Text(f"{name}:", "bold"))
            for line in block_lines(generation):
                console.print(line, highlight=False)
            for start, tokens, other in zip(prompts, film.frames[-1], films[0].frames[-1], strict=True):
                console.print(Text.assemble((start, "dim")) + text_of(tokens, decode, other))
            console.print()
    for line in _summary(names, made):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _summary(names: tuple[str, str], made: list[tuple[Generation, Reads]]) -> list[str]:
    """Forwards, tokens a forward, experts read, agreement."""
    from carpool.evaluate.generations import agreement

    lines, unions = [], []
    for name, (generation, reads) in zip(names, made, strict=True):
        unions.append(reads.sums["union"] / reads.sums["layer_forwards"])
        lines.append(
            f"{name}: {len(generation.forwards)} denoising forwards and {generation.commits} to write blocks, "
            f"{generation.tokens_per_forward:.2f} tokens a forward, {unions[-1]:.1f} experts read in a layer and "
            "denoising forward"
        )
    same, total = agreement(made[1][0].tokens, made[0][0].tokens)
    lines.append(
        f"{same} of {total} positions hold stock's token ({same / total:.0%}); {unions[1] / unions[0]:.0%} of the "
        "experts are read in a layer and denoising forward"
    )
    return lines
