"""`carpool evaluate`: what policies save and cost on a model and a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import (
    embedded_texts,
    model_facts,
    open_model,
    progress,
    require_statistics,
    statistics_of,
)
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.evaluate.check import Agreement
    from carpool.evaluate.study import Settings


LOCKSTEP, BLOCKS = "lockstep", "block-diffusion"


@command("evaluate")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name of a transformers model; default: the reference model.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="'xshare(budget=16) | floor(0.3)', or a policy file; may be repeated."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Rows that share a coreset: batch, request or block:n; default: batch, of blocks request."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences that decode together, such as 1,4,16,64.")] = "16",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help=".txt or .jsonl, a domain each; may be repeated; default: embedded texts."),
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence, prompt included.")] = 128,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt, which keeps its native routing.")] = 32,
    tokens: Annotated[
        int | None,
        typer.Option(help="Decoded tokens to measure at every batch size; default: 24,576, of blocks 2,048."),
    ] = None,
    batches: Annotated[int | None, typer.Option(help="Batches at every batch size, in place of --tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sequences.")] = 0,
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of `carpool calibrate`, for SERE and its like.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write all results to.")] = None,
    allow_unchanged: Annotated[
        bool, typer.Option("--allow-unchanged", help="Let a policy pass that changes no row.")
    ] = False,
    check_lockstep: Annotated[
        bool, typer.Option("--check-lockstep", help="Compare with real decoding instead; needs memory for float64.")
    ] = False,
    interference: Annotated[
        bool, typer.Option("--interference", help="Measure what its neighbours in the batch do to a sequence instead.")
    ] = False,
    co_batches: Annotated[int, typer.Option(help="With --interference: sets of neighbours of every sequence.")] = 16,
    decode: Annotated[
        str, typer.Option(help="lockstep, or block-diffusion for a model that fills masked blocks.")
    ] = LOCKSTEP,
    block_size: Annotated[int | None, typer.Option(help="Of block diffusion; default: the model's.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of block diffusion: accepted probability; default: 0.9.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of block diffusion: most forwards of a block.")] = None,
    mask_token: Annotated[int | None, typer.Option(help="Of block diffusion: its id; default: the model's.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Of block diffusion: autoregressive model that judges what was generated.")
    ] = None,
) -> None:
    """Decode a text in lockstep, stock and under policies, and compare experts read with quality.

    With --decode block-diffusion: denoise blocks of a text, and decode prompts.
    """
    from carpool.artefacts.files import require_writable
    from carpool.artefacts.texts import load_texts
    from carpool.evaluate.results import text_facts, write
    from carpool.evaluate.study import Settings, require_possible, sequences_for, study
    from carpool.evaluate.table import NOTE, table, wide_console
    from carpool.plans.policy_file import PolicyFile, plan_or_file
    from carpool.routing.batch import Grouping

    console = wide_console()
    given = {one: plan_or_file(one) for one in policy or []}
    plans = list(given.values())
    unique = tuple(plan for place, plan in enumerate(plans) if plan not in plans[:place])
    of_blocks: dict[str, Any] = {
        "block_size": block_size, "threshold": threshold, "steps": steps, "mask_token": mask_token, "judge": judge,
    }  # fmt: skip
    if is_block_diffusion(decode, of_blocks, {"--check-lockstep": check_lockstep, "--interference": interference}):
        from carpool.cli.block_diffusion import evaluate_blocks

        evaluate_blocks(
            console, model, unique, Grouping.parse(group or "request"), batch_sizes(batch), text, sequence=sequence,
            prefill=prefill, tokens=tokens, batches=batches, seed=seed, stats=stats, json_path=json_path,
            allow_unchanged=allow_unchanged, **of_blocks,
        )  # fmt: skip
        return
    group, tokens = group or "batch", 24_576 if tokens is None else tokens
    settings = Settings(
        plans=unique,
        grouping=Grouping.parse(group),
        batch_sizes=batch_sizes(batch),
        sequence=sequence, prefill=prefill, tokens=tokens, batches=batches, seed=seed, allow_unchanged=allow_unchanged,
    )  # fmt: skip
    if interference:
        from carpool.cli.interference import for_interference, report_interference

        settings = for_interference(settings, co_batches)
    if json_path is not None:
        require_writable(json_path)
    paths = text or embedded_texts()
    documents = load_texts(paths)
    opened = open_model(model, settings.plans)
    statistics = statistics_of(model, stats)
    require_statistics(settings.plans, statistics)
    fewer = f"lower --sequence, --batch or {'--tokens' if batches is None else '--batches'}"
    with progress("tokenizing", sum(len(document.text) for document in documents)) as advance:
        sequences = sequences_for(settings, documents, opened.tokenizer, advance, fewer=fewer)
    loaded, tokenizer = opened.weights(), opened.tokenizer
    require_possible(loaded, settings, statistics)
    if check_lockstep:
        _check(console, loaded, settings, sequences.ids_ST[:, :-1], statistics, json_path)
        return
    arguments = {
        "policies": [str(plan) for plan in settings.plans], "group": group, "batch": batch, "tokens": tokens,
        "batches": batches, "sequence": sequence, "prefill": prefill,
        "stats": None if stats is None else stats.name, "allow_unchanged": allow_unchanged,
        "policy_files": text_facts([Path(text) for text, plan in given.items() if isinstance(plan, PolicyFile)]),
    }  # fmt: skip
    facts = {"texts": text_facts(paths), "seed": seed, "arguments": arguments}
    if interference:
        report_interference(
            console, loaded, settings, sequences, co_batches, statistics, json_path, tokenizer.decode,
            model=model_facts(loaded, model), **facts,
        )  # fmt: skip
        return
    with progress("evaluating", settings.num_rows) as advance:
        by_batch = study(loaded, settings, sequences, stats=statistics, advance=advance)
    for found in by_batch:
        console.print(table(found, console))
        console.print()
    console.print(NOTE, highlight=False, markup=False)
    if json_path is not None:
        write(
            json_path,
            [result for found in by_batch for result in found],
            decode=tokenizer.decode,
            model=model_facts(loaded, model),
            **facts,
        )
        console.print(f"wrote {json_path}", highlight=False, markup=False, soft_wrap=True)


def is_block_diffusion(decode: str, of_blocks: dict[str, Any], of_lockstep: dict[str, bool]) -> bool:
    """Which way to decode; raises CarpoolError for an unknown one, and for options of the other."""
    if decode not in (LOCKSTEP, BLOCKS):
        raise CarpoolError(f"--decode {decode!r}: use {LOCKSTEP} or {BLOCKS}")
    blocks = decode == BLOCKS
    given = [option for option, value in of_lockstep.items() if value]
    if not blocks:
        given = ["--" + name.replace("_", "-") for name, value in of_blocks.items() if value is not None]
    if given:
        raise CarpoolError(f"{given[0]} belongs to --decode {LOCKSTEP if blocks else BLOCKS}: leave one of them out")
    return blocks


def batch_sizes(text: str) -> tuple[int, ...]:
    """Raises CarpoolError unless the text is a list of whole numbers, 1 or more, each once."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CarpoolError(f"--batch {text!r}: give batch sizes such as 16 or 1,4,16,64") from None
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise CarpoolError(f"--batch {text!r}: give batch sizes of 1 or more, each once")
    return sizes


def _check(
    console: Console, loaded: Any, settings: Settings, ids_ST: Any, statistics: Any, json_path: Path | None
) -> None:
    import json
    from dataclasses import asdict

    from carpool.artefacts.files import write_text
    from carpool.evaluate.check import check_lockstep, in_float64
    from carpool.evaluate.results import provenance

    found: list[Agreement] = []
    runs = [(layout, plan) for layout, _ in settings.layouts() for plan in settings.plans]
    with progress("decoding", 2 * len(runs)) as advance:
        for layout, plan in runs:
            given = (loaded, plan, ids_ST[: layout.batch_size].to(loaded.device), layout)
            found.append(check_lockstep(*given, stats=statistics))
            advance(1)
        with in_float64(loaded):
            for layout, plan in runs:
                given = (loaded, plan, ids_ST[: layout.batch_size].to(loaded.device), layout)
                found.append(check_lockstep(*given, stats=statistics))
                advance(1)
    for one in found:
        console.print(
            f"{one.policy} at batch {one.batch}, {one.dtype}: logits differ from real decoding by {one.max_error:.1e} "
            f"at most, KL {one.mean_kl:.1e} nats; {one.flips} of {one.pairs} (token, layer) pairs use other experts",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if json_path is not None:
        write_text(json_path, json.dumps({**provenance(), "checks": [asdict(one) for one in found]}, indent=1) + "\n")
        console.print(f"wrote {json_path}", highlight=False, markup=False, soft_wrap=True)
