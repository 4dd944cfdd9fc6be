"""What several commands share: the reference model and its texts, loading, checks of options, the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from carpool.cli.table import say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.artefacts.statistics import Statistics
    from carpool.artefacts.texts import Document
    from carpool.hosts.transformers import MoELayer, Opened
    from carpool.plans.policy_file import AnyPlan

SHOWN = 12  # names that a warning lists
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


def calibration_texts(console: Console, texts: list[Path] | None) -> tuple[list[Document], list[tuple[str, str]]]:
    """Documents to calibrate on, and name and hash of their files; without any the embedded ones, which is said."""
    from carpool.artefacts.files import sha256_file
    from carpool.artefacts.texts import load_texts

    paths = texts or embedded_texts()
    if not texts:
        say(console, "without --text: on the embedded texts; measure policies on other text than they were made from")
    return load_texts(paths), [(path.name, sha256_file(path)) for path in paths]


def require_number(option: str, value: float | None, low: float, high: float = inf) -> None:
    """Raises CarpoolError unless an option's number lies between two others, ends included; None was not given."""
    if value is not None and not (low <= value <= high and abs(value) < inf):
        span = f"{low:g} to {high:g}" if high < inf else f"{low:g} or more"
        raise CarpoolError(f"{option} {value}: give {span}")


def warn(console: Console, said: str) -> None:
    """Print a warning."""
    say(console, said, "warning:")


def warn_of_same_text(
    console: Console, plans: Sequence[AnyPlan], statistics: Statistics | None, texts: Sequence[Path]
) -> None:
    """Says so where text to measure on is text that the statistics of these plans were made from."""
    from carpool.artefacts.files import sha256_file
    from carpool.artefacts.statistics import Statistics
    from carpool.plans.policy_file import PolicyFile

    known: set[str] = set()
    for plan in plans:
        own = plan.statistics if isinstance(plan, PolicyFile) else None
        used = statistics if own is None else Statistics.load(own)
        if plan.required_stats() and used is not None:
            known |= {digest for _, digest in used.data}
    same = [path.name for path in texts if sha256_file(path) in known] if known else []
    if same:
        warn(
            console,
            f"the statistics were made from {listed(same)}, too: on text that they have not seen (--text FILE) "
            "policies that use them are likely to lose more",
        )


def listed(names: Sequence[str]) -> str:
    """The names; of many, the first and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def warn_of_few(console: Console, batch_size: int, batches: int) -> None:
    """Says so where what was measured has no interval."""
    from carpool.evaluate.intervals import FEWEST

    if batches < FEWEST:
        warn(
            console,
            f"{batches} batches of {batch_size} do not show how sure these numbers are, so that no interval is given; "
            f"{FEWEST} would: add documents, raise --batches, or lower --batch",
        )


def require_model(model: str | None) -> None:
    """Raises CarpoolError where there is none of that name, before anything heavy is imported."""
    from carpool.artefacts.model_source import source_of

    source_of(model)


def open_model(model: str | None, plans: Sequence[AnyPlan] = ()) -> Opened:
    """A model's layers and tokenizer, before its weights are read; plans that are impossible for it are refused, where
    its configuration says so before transformers is imported."""
    from carpool.artefacts.model_source import configuration, source_of
    from carpool.known_shapes import read

    shape = read(configuration(source_of(model)[0]))
    if shape is not None:
        for plan in plans:
            plan.check(shape.num_experts, shape.rule.top_k)
    from transformers.utils import logging

    from carpool.hosts import transformers as host

    logging.disable_progress_bar()

    def check(layers: Sequence[MoELayer]) -> None:
        for layer in layers:
            for plan in plans:
                plan.check(layer.num_experts, layer.top_k)

    return host.open_model(model, check=check)


def load(model: str | None, stats: Path | None, plans: Sequence[AnyPlan] = ()) -> tuple[Any, Any, Any]:
    """Model, tokenizer and the statistics that were named, or that come with the model."""
    opened = open_model(model, plans)
    given = named_statistics(plans, stats, opened)
    loaded = opened.weights()
    return loaded, opened.tokenizer, statistics_of(loaded, given)


def named_statistics(plans: Sequence[AnyPlan], stats: Path | None, opened: Opened) -> Statistics | None:
    """The statistics that were named, or that are the model's own experts; None where there are neither.

    Raises:
        CarpoolError: before weights are read: the file cannot be; a policy needs statistics, and neither the option nor
            its own file names any, and none that come with a model can be this one's.
    """
    from carpool.artefacts.statistics import Statistics
    from carpool.experts.stored import NAMES
    from carpool.hosts.transformers.plans import missing_statistics

    if stats is not None:
        return Statistics.load(stats)
    if opened.planes is not None:
        return Statistics.load(opened.planes, leave=NAMES if opened.in_planes else ())
    for plan in plans:
        needy = plan.required_stats() and getattr(plan, "statistics", None) is None
        if needy and may_be_shipped(opened) is None:
            raise missing_statistics(plan)
    return None


def statistics_of(model: Any, given: Statistics | None) -> Statistics | None:
    """The given statistics, or those that come with a model, which knows its own; None where there are none."""
    from carpool.artefacts.shipped import shipped_with
    from carpool.artefacts.statistics import Statistics
    from carpool.hosts.transformers import find_layers, identity

    if given is not None:
        return given
    source = shipped_with(identity(find_layers(model)))
    return None if source is None else Statistics.load(source)


def may_be_shipped(opened: Opened) -> Path | None:
    """Statistics that come with a model which may be this one, as far as it is known before its weights are read."""
    from carpool.artefacts.shipped import shipped_for

    first = opened.layers[0]
    return shipped_for([layer.index for layer in opened.layers], first.num_experts, first.top_k)


def model_facts(loaded: Any, name: str | None) -> dict[str, Any]:
    """What identifies a model in the results."""
    from dataclasses import asdict

    from carpool.evaluate.study import describe
    from carpool.hosts.transformers import find_layers, fingerprint, weight_bytes
    from carpool.hosts.transformers.as_stored import shares_stored

    expert_bytes, other_bytes = weight_bytes(loaded)
    layers = find_layers(loaded)
    shares = shares_stored(loaded, layers)
    if min(shares) < 1:  # what is read is what the checkpoint stores, whatever the weights became in memory
        sizes = [2 * layer.expert_numbers for layer in layers]
        expert_bytes = sum(size * share for size, share in zip(sizes, shares, strict=True)) / len(layers)
    return {
        "name": "reference model" if name is None else Path(name).name,
        "architecture": type(loaded).__name__,
        "fingerprint": fingerprint(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **asdict(describe(loaded)),
        "expert_bytes": expert_bytes,
        "other_bytes": other_bytes,
    }


@dataclass(frozen=True)
class Bar:
    """A progress bar: call it with what was added; `say` prints a line above it."""

    advance: Callable[[float], None]
    say: Callable[[str], None]

    def __call__(self, amount: float) -> None:
        self.advance(amount)


@contextmanager
def progress(what: str, total: float, unit: str | None = None) -> Iterator[Bar]:
    """A bar on stderr with the remaining time; with a unit it counts (`3/8 trials`), else it shows a percentage."""
    counted: list[ProgressColumn] = [TaskProgressColumn()]
    if unit is not None:
        counted = [MofNCompleteColumn(), TextColumn(unit)]
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, soft_wrap=True, highlight=False), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield Bar(lambda amount: bar.advance(task, amount), lambda said: bar.console.print(escape(said)))
