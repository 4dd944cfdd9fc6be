"""`carpool evaluate`: what policies save and cost on a model and a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import (
    embedded_texts,
    model_facts,
    named_statistics,
    open_model,
    progress,
    require_model,
    statistics_of,
    warn_of_same_text,
)
from carpool.cli.evaluate_options import Options, Prepared
from carpool.cli.evaluation_table import show_results

if TYPE_CHECKING:
    from carpool.evaluate.metrics import Result
    from carpool.evaluate.study import Settings


@command("evaluate")
def evaluate(options: Options) -> None:
    """Decode a text in lockstep, stock and under policies, and compare experts read with quality.

    With --decode block-diffusion: denoise blocks of a text, and decode prompts.
    """
    console = Console()
    options.require_one_way()
    if not (options.blocks and options.model is None):
        require_model(options.model)
    if options.blocks:
        from carpool.cli.block_diffusion import evaluate_blocks

        evaluate_blocks(console, options)
        return
    settings = check(options)
    ready = prepare(console, options, settings)
    if options.check_lockstep:
        from carpool.cli.lockstep_check import report_check

        report_check(console, ready, settings, options.json_path)
    elif options.interference:
        from carpool.cli.interference import report_interference

        report_interference(console, ready, settings, options, **facts(options, settings, ready))
    else:
        by_batch = measure(ready, settings)
        show_results(console, by_batch)
        write(console, options.json_path, by_batch, ready, **facts(options, settings, ready))


def check(options: Options) -> Settings:
    """The settings; raises CarpoolError for options that are wrong whatever the model is."""
    from carpool.artefacts.files import require_writable
    from carpool.evaluate.study import Settings

    settings = Settings(
        plans=options.plans, grouping=options.grouping, batch_sizes=options.batch_sizes, sequence=options.sequence,
        prefill=options.prefill, tokens=options.tokens, batches=options.batches, seed=options.seed,
        allow_unchanged=options.allow_unchanged, devices=options.devices,
    )  # fmt: skip
    if options.interference:
        from carpool.cli.interference import for_interference

        settings = for_interference(settings, options.co_batches)
    if options.json_path is not None:
        require_writable(options.json_path)
    return settings


def prepare(console: Console, options: Options, settings: Settings) -> Prepared:
    """Draw the text and load the model; raises CarpoolError for what does not fit, before weights are read."""
    from carpool.artefacts.texts import load_texts
    from carpool.evaluate.study import require_possible, sequences_for

    texts = options.text or embedded_texts()
    documents = load_texts(texts)
    opened = open_model(options.model, settings.plans)
    given = named_statistics(settings.plans, options.stats, opened)
    fewer = f"lower --sequence, --batch or {'--tokens' if options.batches is None else '--batches'}"
    with progress("tokenizing", sum(len(document.text) for document in documents)) as advance:
        sequences = sequences_for(settings, documents, opened.tokenizer, advance, fewer=fewer)
    loaded = opened.weights()
    statistics = statistics_of(loaded, given)
    require_possible(loaded, settings, statistics)
    warn_of_same_text(console, settings.plans, statistics, texts)
    return Prepared(loaded, opened.tokenizer, statistics, sequences, texts)


def measure(ready: Prepared, settings: Settings) -> list[list[Result]]:
    """Results by batch size, stock first in each."""
    from carpool.evaluate.study import study

    with progress("evaluating", settings.num_rows(ready.sequences)) as advance:
        return study(ready.model, settings, ready.sequences, stats=ready.statistics, advance=advance)


def facts(options: Options, settings: Settings, ready: Prepared) -> dict[str, Any]:
    """What a file of results says beside them: model, texts, seed, arguments."""
    from carpool.evaluate.results import text_facts

    arguments = {
        "policies": [str(plan) for plan in settings.plans], "group": str(settings.grouping), "batch": options.batch,
        "tokens": settings.tokens, "batches": options.batches, "sequence": settings.sequence,
        "prefill": settings.prefill, "stats": None if options.stats is None else options.stats.name,
        "allow_unchanged": settings.allow_unchanged, "devices": settings.devices,
        "policy_files": text_facts(options.policy_files),
    }  # fmt: skip
    return {
        "model": model_facts(ready.model, options.model), "texts": text_facts(ready.texts), "seed": settings.seed,
        "arguments": arguments,
    }  # fmt: skip


def write(console: Console, path: Path | None, by_batch: list[list[Result]], ready: Prepared, **facts: Any) -> None:
    """The JSON file of all results, where one was asked for."""
    from carpool.evaluate.results import write as write_results

    if path is not None:
        write_results(path, [one for found in by_batch for one in found], decode=ready.tokenizer.decode, **facts)
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
