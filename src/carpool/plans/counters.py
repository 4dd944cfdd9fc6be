"""Counters that live on the device: proof that a policy ran, and what it did, without a sync in the hot path."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.plans.pipeline import Outcome
from carpool.routing.batch import Batch
from carpool.routing.spec import ALL_BITS

FIELDS = (
    "calls", "steps", "rows", "rows_exempt", "rows_changed", "rows_nonfinite",
    "natural_union", "union", "coreset", "pairs", "surrogates", "surrogate_pairs", "floor_overflow", "bits_unread",
    "displaced_mass", "expected_loss",
)  # fmt: skip
SHARES = ("displaced_mass", "expected_loss")  # the other fields count


def measured(batch: Batch, outcome: Outcome, deepest: int = ALL_BITS) -> Tensor:
    """One call of a layer in numbers, float64 in the order of `FIELDS`.

    Args:
        batch: the rows as the host gave them to `route`.
        outcome: what `route` made of them.
        deepest: bits of experts that are read whole.
    """
    real_N, real_N1 = batch.real_N, batch.real_N.unsqueeze(-1)
    guarded = outcome.inputs.batch  # non-finite rows are no longer real, `decode_only` has exempted prompt rows
    kept_NK = outcome.routing.weights_NK != 0
    coreset_GE = outcome.coreset_GE & (outcome.inputs.voters_G1 > 0)
    one = torch.ones((), dtype=torch.float64, device=real_N.device)
    left_NK = outcome.routing.surrogate_weights_NK
    foreseen = (one * 0, one * 0) if left_NK is None else (outcome.surrogates_SE.sum(), (left_NK != 0).sum())
    unread = one * 0 if outcome.routing.depth_NK is None else _unread(outcome, kept_NK & real_N1, deepest)
    values = (
        one, one * batch.num_steps, real_N.sum(), (guarded.real_N & guarded.exempt_N).sum(),
        outcome.changed_N.sum(), outcome.nonfinite_N.sum(),
        batch.step_any(outcome.inputs.native_NE & real_N1).sum(), batch.step_any(outcome.computed_NE & real_N1).sum(),
        coreset_GE.sum(), (kept_NK & real_N1).sum(), *foreseen, outcome.overflow_SE.sum(), unread,
        (outcome.displaced_N * real_N).sum(), (outcome.expected_loss_N * real_N).sum(),
    )  # fmt: skip
    return torch.stack([value.double() for value in values])


def _unread(outcome: Outcome, pairs_NK: Tensor, deepest: int) -> Tensor:
    depth_SE = outcome.depth_of(pairs_NK)
    return ((deepest - depth_SE).clamp_min(0) * (depth_SE > 0)).sum()


@dataclass(frozen=True)
class LayerReport:
    """Totals of one layer since the run began, or since `reset`.

    Attributes:
        calls: times the layer's router ran. steps: engine steps (calls, unless a call holds several).
        rows: real rows. rows_exempt, rows_changed, rows_nonfinite: of these.
        natural_union, union, coreset: experts of real rows, summed over steps (coreset: over groups with a voter).
        pairs: (row, expert) pairs computed.
        surrogates: experts whose surrogates are read, summed over steps. surrogate_pairs: pairs left to them.
        floor_overflow: experts read only because of the floor, summed over steps.
        bits_unread: by how many bits experts were read less deep than whole, summed over experts and steps.
        displaced_mass: share of a row's native weight that is not computed, summed over real rows; divide by `rows` for
            the mean. expected_loss: the same, pairs left to surrogates at what calibration expects.
    """

    layer: str
    calls: int
    steps: int
    rows: int
    rows_exempt: int
    rows_changed: int
    rows_nonfinite: int
    natural_union: int
    union: int
    coreset: int
    pairs: int
    surrogates: int
    surrogate_pairs: int
    floor_overflow: int
    bits_unread: int
    displaced_mass: float
    expected_loss: float


class Counters:
    """Per-layer totals in one float64 tensor `[layers, fields]`; exact for counts below `2**53`."""

    def __init__(self, layers: list[str], device: torch.device | str = "cpu") -> None:
        self.layers = layers
        self._totals_LF = torch.zeros(len(layers), len(FIELDS), dtype=torch.float64, device=device)
        self._totals_F = [self._totals_LF[row] for row in range(len(layers))]

    def add(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        """Add one call of a layer; in place and without a sync."""
        self.add_measured(layer, measured(batch, outcome))

    def add_measured(self, layer: int, values_F: Tensor) -> None:
        """Add what `measured` made of one call."""
        self._totals_F[layer].add_(values_F)

    def of_layer(self, layer: int) -> Tensor:
        """The totals of one layer, for kernels that count by themselves; float64 in the order of `FIELDS`."""
        return self._totals_F[layer]

    def reset(self) -> None:
        self._totals_LF.zero_()

    def reading(self) -> Reading:
        """The totals as they are now, on their way to the host."""
        return Reading(self.layers, self._totals_LF)

    def report(self) -> list[LayerReport]:
        """Read the totals (this is where the device is waited for)."""
        return self.reading().report()


class Reading:
    """Totals that are copied to the host while the device goes on."""

    def __init__(self, layers: list[str], totals_LF: Tensor) -> None:
        self._layers = layers
        self._copied: torch.cuda.Event | None = None
        if totals_LF.device.type == "cpu":
            self._rows_LF = totals_LF.clone()
            return
        self._rows_LF = torch.empty_like(totals_LF, device="cpu", pin_memory=totals_LF.device.type == "cuda")
        self._rows_LF.copy_(totals_LF, non_blocking=True)
        if totals_LF.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def ready(self) -> bool:
        """Whether `report` would not wait."""
        return self._copied is None or self._copied.query()

    def report(self) -> list[LayerReport]:
        if self._copied is not None:
            self._copied.synchronize()
        reports = []
        for layer, values in zip(self._layers, self._rows_LF.tolist(), strict=True):
            named: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
            counts = {name: int(value) for name, value in named.items() if name not in SHARES}
            reports.append(LayerReport(layer, **named | counts))
        return reports


def totals(report: list[LayerReport]) -> dict[str, float]:
    """Sums over the layers, by field."""
    return {name: sum(asdict(row)[name] for row in report) for name in FIELDS}
