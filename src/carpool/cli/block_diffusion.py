"""`carpool evaluate --decode block-diffusion`: what policies save and cost while blocks are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.cli.common import embedded_texts, load, model_facts, progress
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from rich.console import Console

    from carpool.plans.policy_file import AnyPlan
    from carpool.routing.batch import Grouping

THRESHOLD = 0.9  # DES's; SDAR and LLaDA2 use 0.85 to 0.95
TOKENS = 2048
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


def evaluate_blocks(
    console: Console,
    model: str | None,
    plans: Sequence[AnyPlan],
    grouping: Grouping,
    batch_sizes: tuple[int, ...],
    text: Sequence[Path] | None,
    *,
    sequence: int,
    prefill: int,
    tokens: int | None,
    batches: int | None,
    seed: int,
    stats: Path | None,
    json_path: Path | None,
    allow_unchanged: bool,
    block_size: int | None,
    threshold: float | None,
    steps: int | None,
    mask_token: int | None,
    judge: str | None,
) -> None:
    """Measure, print a table for every batch size, write the JSON; raises CarpoolError for bad input."""
    from carpool.artefacts.files import require_writable
    from carpool.artefacts.texts import load_texts
    from carpool.diffusion import Decoding
    from carpool.evaluate.block_study import BlockSettings, as_dict, block_study
    from carpool.evaluate.block_table import NOTE, table
    from carpool.evaluate.results import text_facts, write_rows
    from carpool.evaluate.sequences import draw

    if json_path is not None:
        require_writable(json_path)
    if sequence <= prefill:
        raise CarpoolError(f"--sequence {sequence} leaves nothing to decode after --prefill {prefill}")
    paths = text or embedded_texts()
    documents = load_texts(paths)
    loaded, tokenizer, statistics = load(diffusion_model(model), stats, plans)
    decoding = Decoding.of(
        loaded, mask_token=mask_token, block=block_size, threshold=THRESHOLD if threshold is None else threshold,
        max_new=sequence - prefill, steps=steps, end_tokens=(),
    )  # fmt: skip
    settings = BlockSettings(
        tuple(plans), grouping, batch_sizes, decoding, prompt=prefill, tokens=tokens or TOKENS, batches=batches,
        seed=seed, allow_unchanged=allow_unchanged,
    )  # fmt: skip
    judging = judge_for(model, judge)
    if judging is not None:
        require_same_tokens(judging, loaded, decoding.mask_token)
    with progress("tokenizing", sum(len(document.text) for document in documents)) as advance:
        sequences = draw(
            documents, tokenizer, count=settings.num_sequences, length=sequence, seed=seed, progress=advance
        )
    with progress("decoding blocks", settings.work) as advance:
        by_batch = block_study(loaded, settings, sequences, judge=judging, stats=statistics, advance=advance)
    for found in by_batch:
        console.print(table(found, console))
        console.print()
    console.print(NOTE, highlight=False, markup=False)
    if json_path is None:
        return
    arguments = {
        "decode": "block-diffusion", "policies": [str(plan) for plan in plans], "group": str(grouping),
        "batch": ",".join(map(str, batch_sizes)), "tokens": settings.tokens, "batches": batches, "sequence": sequence,
        "prefill": prefill, "block_size": decoding.block, "threshold": decoding.threshold, "steps": steps,
        "mask_token": decoding.mask_token, "stats": None if stats is None else stats.name,
        "allow_unchanged": allow_unchanged, "judge": None if judging is None else Path(judge or "reference model").name,
    }  # fmt: skip
    write_rows(
        json_path, [as_dict(result) for found in by_batch for result in found], kind="carpool block diffusion",
        model=model_facts(loaded, diffusion_model(model)), texts=text_facts(paths), seed=seed, arguments=arguments,
    )  # fmt: skip
    console.print(f"wrote {json_path}", highlight=False, markup=False, soft_wrap=True)
