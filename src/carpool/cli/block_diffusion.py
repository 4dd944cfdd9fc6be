"""`carpool evaluate --decode block-diffusion`: what policies save and cost while blocks are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.cli.common import embedded_texts, load, model_facts, progress, warn_of_same_text
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from rich.console import Console

    from carpool.cli.evaluate_options import Options
    from carpool.evaluate.block_study import BlockResult, BlockSettings

THRESHOLD = 0.9  # DES's; SDAR and LLaDA2 use 0.85 to 0.95
REQUIRED = (
    "the block diffusion model of the demo is not installed: pip install 'carpool[demo]', or name a model that was "
    "trained to fill in masked blocks"
)


def diffusion_model(model: str | None) -> str:
    """The model to load: the one that is named, or the demo's.

    Raises:
        CarpoolError: none is named and the demo has none.
    """
    if model is not None:
        return model
    try:
        from carpool_demo import diffusion_model_path

        return str(diffusion_model_path())
    except (ImportError, FileNotFoundError):
        raise CarpoolError(REQUIRED) from None


def judge_for(model: str | None, judge: str | None) -> Any:
    """The autoregressive model that judges generated text: the one that is named; the reference model where the demo's
    diffusion model, which has its tokens, generates; else None."""
    from carpool.hosts.transformers import load_model

    if judge is None and model is not None:
        return None
    return load_model(judge)[0]


def require_same_tokens(judge: Any, model: Any, mask_token: int) -> None:
    """Raises CarpoolError if the judge lacks tokens that the model may generate."""
    sizes = [one.config.get_text_config().vocab_size for one in (judge, model)]
    if sizes[0] < sizes[1] - (mask_token == sizes[1] - 1):
        raise CarpoolError(
            f"--judge has {sizes[0]} tokens and the model {sizes[1]}: name an autoregressive model with its tokenizer"
        )


def evaluate_blocks(console: Console, options: Options) -> None:
    """Measure, print a table for every batch size, write the JSON; raises CarpoolError for bad input."""
    from carpool.artefacts.files import require_writable
    from carpool.artefacts.texts import load_texts
    from carpool.cli.block_table import show_blocks
    from carpool.diffusion import Decoding
    from carpool.evaluate.block_study import BlockSettings, block_sequences, block_study

    plans, sequence, prefill = options.plans, options.sequence, options.prefill
    if options.json_path is not None:
        require_writable(options.json_path)
    if sequence <= prefill:
        raise CarpoolError(f"--sequence {sequence} leaves nothing to decode after --prefill {prefill}")
    texts = options.text or embedded_texts()
    documents = load_texts(texts)
    loaded, tokenizer, statistics = load(diffusion_model(options.model), options.stats, plans)
    warn_of_same_text(console, plans, statistics, texts)
    threshold = THRESHOLD if options.threshold is None else options.threshold
    decoding = Decoding.of(
        loaded, mask_token=options.mask_token, block=options.block_size, threshold=threshold,
        max_new=sequence - prefill, steps=options.steps, end_tokens=(),
    )  # fmt: skip
    settings = BlockSettings(
        plans, options.grouping, options.batch_sizes, decoding, prompt=prefill, tokens=options.tokens,
        batches=options.batches, seed=options.seed, allow_unchanged=options.allow_unchanged,
    )  # fmt: skip
    judge = judge_for(options.model, options.judge)
    if judge is not None:
        require_same_tokens(judge, loaded, decoding.mask_token)
    with progress("tokenizing", sum(len(document.text) for document in documents)) as advance:
        sequences = block_sequences(settings, documents, tokenizer, advance)
    with progress("decoding blocks", settings.work(sequences)) as advance:
        by_batch = block_study(loaded, settings, sequences, judge=judge, stats=statistics, advance=advance)
    show_blocks(console, by_batch)
    if options.json_path is not None:
        judged = None if judge is None else Path(options.judge or "reference model").name
        _write(options, settings, loaded, texts, by_batch, judged)
        console.print(f"wrote {options.json_path}", highlight=False, markup=False, soft_wrap=True)


def _write(
    options: Options,
    settings: BlockSettings,
    loaded: Any,
    texts: Sequence[Path],
    by_batch: Sequence[Sequence[BlockResult]],
    judged: str | None,
) -> None:
    from carpool.evaluate.block_study import as_dict
    from carpool.evaluate.results import text_facts, write_rows

    assert options.json_path is not None
    decoding = settings.decoding
    arguments = {
        "decode": options.decode, "policies": [str(plan) for plan in settings.plans], "group": str(settings.grouping),
        "batch": ",".join(map(str, settings.batch_sizes)), "tokens": settings.tokens, "batches": options.batches,
        "sequence": options.sequence, "prefill": options.prefill, "block_size": decoding.block,
        "threshold": decoding.threshold, "steps": options.steps, "mask_token": decoding.mask_token,
        "stats": None if options.stats is None else options.stats.name, "allow_unchanged": options.allow_unchanged,
        "judge": judged,
    }  # fmt: skip
    write_rows(
        options.json_path, [as_dict(result) for found in by_batch for result in found], kind="carpool block diffusion",
        model=model_facts(loaded, diffusion_model(options.model)), texts=text_facts(texts), seed=options.seed,
        arguments=arguments,
    )  # fmt: skip
