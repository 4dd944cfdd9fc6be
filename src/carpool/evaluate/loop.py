"""The one loop that measures: stock, then plans, over the same passes, and the checks without which there is no result.

Shapes: `M` batches of `B` sequences; one pass reads `S` sequences (whole batches) of `X` positions and compares `R` of
their `S * D` decoded tokens; `L` MoE layers, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.lockstep import Comparison, Observer, compare, forward
from carpool.evaluate.measured import Measured, Tally
from carpool.plans.grammar import Plan
from carpool.plans.guards import MinBatch
from carpool.plans.policy_file import AnyPlan, PolicyFile
from carpool.policies import TopK

ROWS_PER_PASS = 4096  # small batches are stacked up to so many rows
LOGITS_PER_PASS = 1 << 28  # ... and so many logits: 1 GiB in float32


@dataclass(frozen=True)
class MoE:
    """What an evaluation has to know of a model: MoE layers, routed experts `E` and experts per token `K`."""

    layers: int
    experts: int
    top_k: int

    @property
    def stock(self) -> Plan:
        """A plan that keeps every native routing bit for bit, so that stock's union can be counted."""
        return Plan(TopK(self.top_k))


class Watcher(Protocol):
    """Sees what one plan does, pass by pass."""

    def begin(self, layout: Layout, part: Part) -> None: ...

    def __call__(self, layer: int, batch: Any, outcome: Any) -> None: ...

    def finish(self, part: Part, found: Comparison) -> None: ...


@dataclass(frozen=True, eq=False)
class _Stock:
    """What stock does in one pass: logits of the compared tokens, themselves compared, and sums by layer."""

    logits_RV: Tensor
    found: Comparison
    layers_LFM: Tensor


class Loop:
    """Measures plans beside stock over the same passes.

    Args:
        parts: the passes. domains: names of the texts' domains.
        stats: statistics for policies that need some.
        device_E: see `forward`.
        kept: bytes of stock's logits that may stay in memory from one call to the next.
    """

    def __init__(
        self,
        model: Any,
        moe: MoE,
        layout: Layout,
        parts: Sequence[Part],
        domains: tuple[str, ...],
        *,
        stats: Any = None,
        device_E: Tensor | None = None,
        kept: int = 0,
    ) -> None:
        self.model, self.moe, self.layout, self.parts, self.domains = model, moe, layout, parts, domains
        self._stats, self._device_E, self._kept = stats, device_E, kept
        self._stock: dict[int, _Stock] = {}
        self._untouched = False

    def run(
        self,
        plans: Sequence[AnyPlan],
        *,
        watchers: Sequence[Watcher] | None = None,
        allow_unchanged: bool = False,
        advance: Callable[[int], None] = lambda sequences: None,
    ) -> list[Measured]:
        """Stock first, then every plan.

        Args:
            watchers: one for stock and for every plan.
            allow_unchanged: a plan may change no row.
            advance: told the sequences of every pass that is done.

        Raises:
            CarpoolError: a plan that does not fit the model, did not run in every layer, should act and changed no
                row, or changed rows without reaching the experts; counting stock's union changed its logits; logits
                that are not finite; not enough memory.
        """
        for plan in plans:
            plan.check(self.moe.experts, self.moe.top_k)
        tallies = [Tally(plan, self.layout, self.domains) for plan in (None, *plans)]
        watching: Sequence[Watcher | None] = watchers or [None] * len(tallies)
        with explaining_memory(self.layout):
            for place, part in enumerate(self.parts):
                stock = self._stock.get(place) or self._run_stock(place, watching[0])
                tallies[0].add(part, stock.found, stock.layers_LFM)
                advance(len(part.ids_SX))
                for tally, watcher in zip(tallies[1:], watching[1:], strict=True):
                    assert tally.plan is not None
                    logits_RV, layers_LFM = self._forward(tally.plan, part, watcher)
                    found = compare(stock.logits_RV, logits_RV, _targets(part, logits_RV))
                    if watcher is not None:
                        watcher.finish(part, found)
                    tally.add(part, found, layers_LFM)
                    advance(len(part.ids_SX))
        measured = [tally.result() for tally in tallies]
        for result in measured[1:]:
            assert result.plan is not None
            require_reached(result.plan, result.changed_rows, float(result.kl_M.sum()))
            if not allow_unchanged:
                require_changed(result.plan, result.changed_rows, result.layout, self.moe)
        return measured

    def _run_stock(self, place: int, watcher: Watcher | None) -> _Stock:
        """Stock in one pass; kept where all passes together are small enough."""
        part = self.parts[place]
        logits_RV, layers_LFM = self._forward(self.moe.stock, part, watcher)
        if not self._untouched:
            self._require_untouched(part, logits_RV)
        made = _Stock(logits_RV, compare(logits_RV, logits_RV, _targets(part, logits_RV)), layers_LFM)
        if watcher is not None:
            watcher.finish(part, made.found)
        if logits_RV.nbytes * len(self.parts) <= self._kept:
            self._stock[place] = made
        return made

    def _forward(self, plan: AnyPlan, part: Part, watcher: Watcher | None) -> tuple[Tensor, Tensor]:
        """Logits of the compared tokens, and what the layers did."""
        if watcher is not None:
            watcher.begin(self.layout, part)
        observe: Observer | None = watcher
        run = forward(
            self.model, plan, part.ids_SX, self.layout, num_layers=self.moe.layers, stats=self._stats, observe=observe,
            device_E=self._device_E,
        )  # fmt: skip
        return part.counted(run.logits_RV), run.layers_LFM.cpu()

    def _require_untouched(self, part: Part, stock_RV: Tensor) -> None:
        with torch.inference_mode():
            plain_RV = part.counted(self.layout.logits(self.model, part.ids_SX.to(stock_RV.device)))
        if not torch.equal(plain_RV, stock_RV):
            raise CarpoolError(
                "counting the experts that stock reads changed the model's logits; please report this model"
            )
        self._untouched = True


def _targets(part: Part, logits_RV: Tensor) -> Tensor:
    return part.counted(part.targets_SD.flatten()).to(logits_RV.device)


def require_reached(plan: AnyPlan, changed_rows: int, kl: float) -> None:
    """Raises CarpoolError where rows were routed otherwise and every prediction is stock's: the new routing never
    reached the experts."""
    if changed_rows and kl == 0:
        raise CarpoolError(
            f"{plan} routed {changed_rows} rows otherwise, yet every prediction is stock's: its routing does not reach "
            "the experts; load the model without kernels that replace its MoE block, or report it"
        )


def require_changed(plan: AnyPlan, changed_rows: int, layout: Layout, moe: MoE) -> None:
    """Raises CarpoolError if a plan that should act changed no row: then nothing was measured."""
    if changed_rows:
        return
    voters = layout.batch_size * layout.stride // layout.groups
    plans = plan.plans if isinstance(plan, PolicyFile) else [plan]
    limits = [one.policy.limit(moe.experts, moe.top_k) for one in plans]
    fits = all(isinstance(limit, int) and limit >= min(moe.experts, voters * moe.top_k) for limit in limits)
    waits = plan.policy.kind == "group" and any(
        isinstance(guard, MinBatch) and guard.voters > voters for guard in plan.guards
    )
    if not fits and not waits:
        raise CarpoolError(
            f"{plan} changed no row at batch {layout.batch_size} grouped by {layout.grouping}: "
            "it is an identity setting or did nothing; pass --allow-unchanged if that is what you want to measure"
        )


@contextmanager
def explaining_memory(layout: Layout) -> Iterator[None]:
    """Raises CarpoolError where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise CarpoolError(
            f"batch {layout.batch_size} with {layout.decoded} decoded positions does not fit into memory: "
            "lower --batch or --sequence"
        ) from None


def sequences_per_pass(model: Any, layout: Layout) -> int:
    """As many whole batches together as memory allows, in sequences."""
    vocabulary = model.config.get_text_config().vocab_size
    rows, logits = layout.batch_size * layout.positions, layout.batch_size * layout.decoded * vocabulary
    return layout.batch_size * max(1, min(ROWS_PER_PASS // rows, LOGITS_PER_PASS // logits))
