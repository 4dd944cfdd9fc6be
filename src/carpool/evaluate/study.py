"""An evaluation from settings to results: sequences, batch sizes, stock and policies, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carpool.errors import CarpoolError
from carpool.evaluate.layout import Layout
from carpool.evaluate.loop import MoE
from carpool.evaluate.measure import in_order, measure
from carpool.evaluate.metrics import Result, results
from carpool.evaluate.sequences import FEWER, Cut, Document, Sequences, amount
from carpool.plans.policy_file import AnyPlan, stats_for
from carpool.routing.batch import Batch, Grouping

if TYPE_CHECKING:
    from carpool.hosts.transformers import MoELayer

Advance = Callable[[int], None]
TOKENS = 24_576  # decoded at every batch size unless told otherwise


@dataclass(frozen=True)
class Settings:
    """What to evaluate.

    Attributes:
        plans: policies, bare or with guards, or policy files.
        grouping: which rows share a coreset.
        batch_sizes: sequences that decode together; every size draws its own from the same texts.
        sequence: inputs of a sequence, prompt included. prefill: of these, the prompt.
        tokens: decoded tokens to measure at every batch size, rounded to whole batches; ten for an interval if the
            texts hold them. None: `TOKENS`, or what the texts hold. No two batches share a document.
        batches: number of batches instead.
        seed: of the sequences.
        allow_unchanged: a plan may change no row.
        devices: that experts lie on in order, for policies with a budget per device.
    """

    plans: tuple[AnyPlan, ...]
    grouping: Grouping
    batch_sizes: tuple[int, ...]
    sequence: int = 128
    prefill: int = 32
    tokens: int | None = None
    batches: int | None = None
    seed: int = 0
    allow_unchanged: bool = False
    devices: int | None = None

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

    def layouts(self) -> list[Layout]:
        """Of every batch size."""
        return [Layout(size, self.sequence, self.prefill, self.grouping) for size in self.batch_sizes]

    def amount(self, layout: Layout) -> tuple[int, int]:
        """The fewest batches that will do and how many are wanted."""
        return amount(self.tokens, self.batches, TOKENS, layout.batch_size * layout.decoded)

    def num_rows(self, sequences: Iterable[Sequences]) -> int:
        """Rows of all forward passes over these sequences, for a progress bar."""
        return sum(len(one.ids_ST) for one in sequences) * self.sequence * (1 + len(self.plans))


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
    device = next(model.parameters()).device
    two_tokens, batch = torch.zeros(1, 2, dtype=torch.int64, device=device), None
    if settings.devices is not None:
        batch = Batch.of(2, device=device, device_E=in_order(moe.experts, settings.devices).to(device))
    for plan in settings.plans:
        how: dict[str, Any] = {"group": settings.grouping, "stats": stats_for(plan, stats), "batch": batch}
        with torch.inference_mode(), share(model, plan, **how):
            model(input_ids=two_tokens, use_cache=False)


def sequences_for(
    settings: Settings,
    documents: Iterable[Document],
    tokenizer: Any,
    progress: Advance | None = None,
    *,
    fewer: str = FEWER,
) -> list[Sequences]:
    """The sequences of every batch size.

    Raises:
        CarpoolError: the texts do not hold what was asked for, or not even one batch.
    """
    cut = Cut.of(documents, tokenizer, length=settings.sequence, seed=settings.seed, progress=progress)
    return [
        cut.draw_within(*settings.amount(layout), layout.batch_size, seed=settings.seed, fewer=fewer)
        for layout in settings.layouts()
    ]


def study(
    model: Any,
    settings: Settings,
    sequences: Sequence[Sequences],
    *,
    stats: Any = None,
    advance: Advance = lambda rows: None,
) -> list[list[Result]]:
    """Results by batch size, each over its own sequences, stock first; raises as `measure` does."""
    moe = describe(model)
    return [
        results(
            measure(
                model, moe, settings.plans, own, layout, own.batches,
                stats=stats, devices=settings.devices, allow_unchanged=settings.allow_unchanged, advance=advance,
            )
        )
        for layout, own in zip(settings.layouts(), sequences, strict=True)
    ]  # fmt: skip
