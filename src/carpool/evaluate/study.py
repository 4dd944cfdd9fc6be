"""An evaluation from settings to results: sequences, batch sizes, stock and policies, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carpool.errors import CarpoolError
from carpool.evaluate.layout import Layout
from carpool.evaluate.loop import MoE
from carpool.evaluate.measure import measure
from carpool.evaluate.metrics import Result, results
from carpool.evaluate.sequences import FEWER, Document, Sequences, draw
from carpool.plans.policy_file import AnyPlan, stats_for
from carpool.routing.batch import Grouping

if TYPE_CHECKING:
    from carpool.hosts.transformers import MoELayer

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """What to evaluate.

    Attributes:
        plans: policies, bare or with guards, or policy files.
        grouping: which rows share a coreset.
        batch_sizes: sequences that decode together; every size uses the same sequences as far as it needs them.
        sequence: inputs of a sequence, prompt included. prefill: of these, the prompt.
        tokens: decoded tokens to measure at every batch size, rounded to whole batches, two at least.
        batches: number of batches instead.
        seed: of the sequences.
        allow_unchanged: a plan may change no row.
    """

    plans: tuple[AnyPlan, ...]
    grouping: Grouping
    batch_sizes: tuple[int, ...]
    sequence: int = 128
    prefill: int = 32
    tokens: int = 24_576
    batches: int | None = None
    seed: int = 0
    allow_unchanged: bool = False

    def __post_init__(self) -> None:
        if not self.plans:
            raise CarpoolError("no policy was given: name one or more, such as --policy 'xshare(budget=16)'")
        if not self.batch_sizes:
            raise CarpoolError("no batch size was given: name one or more, such as --batch 1,16")
        for name in ("tokens", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CarpoolError(f"--{name} {value}: give 1 or more")
        if self.seed < 0:
            raise CarpoolError(f"--seed {self.seed}: give 0 or more")
        self.layouts()

    def layouts(self) -> list[tuple[Layout, int]]:
        """Layout and number of batches of every batch size."""
        made = [Layout(rows, self.sequence, self.prefill, self.grouping) for rows in self.batch_sizes]
        return [
            (layout, self.batches or max(2, round(self.tokens / (layout.batch_size * layout.decoded))))
            for layout in made
        ]

    @property
    def num_sequences(self) -> int:
        return max(layout.batch_size * batches for layout, batches in self.layouts())

    @property
    def num_rows(self) -> int:
        """Rows of all forward passes, for a progress bar."""
        rows = sum(layout.batch_size * layout.positions * batches for layout, batches in self.layouts())
        return rows * (1 + len(self.plans))


def describe(model: Any) -> MoE:
    """The numbers of a model's MoE layers.

    Raises:
        CarpoolError: a dense model, an unknown router, or layers that differ in experts or experts per token.
    """
    from carpool.hosts.transformers import find_layers

    return describe_layers(find_layers(model))


def describe_layers(layers: Sequence[MoELayer]) -> MoE:
    """The same from the layers; raises CarpoolError where they differ."""
    shapes = sorted({(layer.num_experts, layer.top_k) for layer in layers})
    if len(shapes) > 1:
        raise CarpoolError(f"the model's layers differ in (experts, experts per token): {shapes}; not supported yet")
    return MoE(len(layers), *shapes[0])


def require_possible(model: Any, settings: Settings, stats: Any) -> None:
    """Raises CarpoolError for what would fail later: plans that do not fit the model, missing or foreign statistics,
    sequences beyond the model's positions."""
    import torch

    from carpool.hosts.transformers import share

    moe = describe(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and settings.sequence > limit:
        raise CarpoolError(f"--sequence {settings.sequence} exceeds the model's {limit} positions")
    for plan in settings.plans:
        plan.check(moe.experts, moe.top_k)
    two_tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    for plan in settings.plans:
        with torch.inference_mode(), share(model, plan, group=settings.grouping, stats=stats_for(plan, stats)):
            model(input_ids=two_tokens, use_cache=False)


def sequences_for(
    settings: Settings,
    documents: Iterable[Document],
    tokenizer: Any,
    progress: Advance | None = None,
    *,
    fewer: str = FEWER,
) -> Sequences:
    """The sequences that the largest batch size needs (others use the first of them); raises as `draw` does."""
    return draw(
        documents, tokenizer, count=settings.num_sequences, length=settings.sequence, seed=settings.seed,
        progress=progress, fewer=fewer,
    )  # fmt: skip


def study(
    model: Any, settings: Settings, sequences: Sequences, *, stats: Any = None, advance: Advance = lambda rows: None
) -> list[list[Result]]:
    """Results by batch size, stock first in each; raises as `measure` does."""
    moe = describe(model)
    return [
        results(
            measure(
                model, moe, settings.plans, sequences, layout, batches,
                stats=stats, allow_unchanged=settings.allow_unchanged, advance=advance,
            )
        )
        for layout, batches in settings.layouts()
    ]  # fmt: skip
