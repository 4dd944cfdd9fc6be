"""What several commands share: the reference model and its texts, loading, facts, the progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.grammar import Plan
    from carpool.hosts.transformers import MoELayer

REQUIRED = (
    "the reference model and its texts are not installed: pip install 'carpool[demo]', or name a model and --text"
)


def embedded_texts() -> list[Path]:
    """The texts of the demo distribution."""
    try:
        from carpool_demo import TEXTS
    except ImportError:
        raise CarpoolError(REQUIRED) from None
    return sorted(TEXTS.glob("*.jsonl"))


def load(
    model: str | None, stats: Path | None, plans: Sequence[Plan] = (), device_map: str | None = None
) -> tuple[Any, Any, Any]:
    """Model, tokenizer and statistics; the reference model brings its own statistics.

    Plans that are impossible for the model's layers are refused before its weights are read.
    """
    from transformers.utils import logging

    from carpool.hosts.transformers import load_model
    from carpool.stats import Statistics

    logging.disable_progress_bar()

    def check(layers: Sequence[MoELayer]) -> None:
        for layer in layers:
            for plan in plans:
                plan.check(layer.num_experts, layer.top_k)

    loaded, tokenizer = load_model(model, check=check, device_map=device_map)
    if stats is None and model is None:
        stats = shipped_statistics()
    return loaded, tokenizer, None if stats is None else Statistics.load(stats)


def shipped_statistics() -> Path | None:
    """The reference model's statistics, where its distribution has some."""
    from carpool_demo import HERE

    shipped: Path = HERE / "stats.safetensors"
    return shipped if shipped.exists() else None


def model_facts(loaded: Any, name: str | None) -> dict[str, Any]:
    """What identifies a model in the results."""
    from dataclasses import asdict

    from carpool.evaluate.study import describe
    from carpool.hosts.transformers import fingerprint

    return {
        "name": "reference model" if name is None else Path(name).name,
        "architecture": type(loaded).__name__,
        "fingerprint": fingerprint(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **asdict(describe(loaded)),
    }


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr with the remaining time; yields a function to call with what was added."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)
