"""Prometheus metrics beside the engine's own, as totals over layers: a handful of series, whatever is served."""

from __future__ import annotations

import functools
import time
from typing import Any

from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.proof import Proof
from carpool.hosts.engine.steps import Steps
from carpool.plans.counters import Counters, LayerReport, Reading, totals

PERIOD = 1.0  # seconds between two readings of the device's counters
LABELS = ("model_name", "engine")
Labels = tuple[str, str]  # their values
UNLABELLED: Labels = ("", "0")
COUNTERS = {  # field of the counters: metric (Prometheus appends _total), help
    "rows": ("carpool_rows", "rows (tokens times layers) of steps in which a policy ran"),
    "rows_exempt": ("carpool_rows_exempt", "of these, rows with native routing: prompts and requests that opted out"),
    "rows_changed": ("carpool_rows_changed", "of these, rows whose experts a policy changed"),
    "rows_nonfinite": ("carpool_rows_nonfinite", "of these, rows with NaN or infinite logits"),
    "steps": ("carpool_layer_steps", "steps times layers in which a policy ran"),
    "natural_union": ("carpool_experts_natural", "distinct experts that native routing would have read"),
    "union": ("carpool_experts_read", "distinct experts read"),
    "displaced_mass": (
        "carpool_displaced_mass",
        "share of its native weight that is not computed for a row, summed over rows",
    ),
    "expected_loss": (
        "carpool_expected_loss",
        "the same, with pairs left to surrogates at what calibration expects to be lost",
    ),
    "surrogates": ("carpool_surrogates_read", "distinct experts whose surrogates are read"),
    "surrogate_pairs": ("carpool_surrogate_pairs", "pairs of a row and an expert that are left to surrogates"),
    "floor_overflow": ("carpool_floor_overflow", "distinct experts read only because of the floor"),
    "bits_unread": (
        "carpool_bits_unread",
        "bits by which experts in planes were read less deep than they are stored, summed over experts read",
    ),
    "natural_bytes": (
        "carpool_natural_bytes",
        "bytes of experts that native routing would have read, on one rank (all with EP)",
    ),
    "read_bytes": ("carpool_read_bytes", "bytes of experts and surrogates read, on one rank (all with EP)"),
    "passes": ("carpool_steps", "steps with a request while policies were on"),
    "passes_exempt": ("carpool_steps_exempt", "of these, without a row that may share: prompts, opted out"),
    "passes_alone": ("carpool_steps_alone", "of these, in which every row that may share was alone in its group"),
}


class Metrics:
    """Copies the counters of one worker to Prometheus.

    Args:
        counters: of the worker.
        layers: in the order of the counters.
        publishes: False on all but one of the ranks that decide alike.
        proof: asked, at each reading, whether every layer's policy ran as often as it had to.
        steps: counted on the host.
        labels: values of `LABELS`.
    """

    def __init__(
        self, counters: Counters, layers: list[Layer], publishes: bool, proof: Proof | None = None,
        steps: Steps | None = None, labels: Labels = UNLABELLED,
    ) -> None:  # fmt: skip
        self._counters, self._layers, self._proof, self.publishes = counters, layers, proof, publishes
        self._steps, self._labels = steps, labels
        self._last: dict[str, float] = {}
        self._next = 0.0
        self._reading: tuple[Reading, tuple[int, ...]] | None = None
        if publishes:  # the series are there from the start, at 0
            _metrics(labels), _refusals(labels)

    def publish(self, now: bool = False) -> None:
        """Add what happened since the last time, at most once a `PERIOD` and without waiting for the device: what is
        still on its way is added by a later call. `now` waits and adds all.

        Raises:
            CarpoolError: a layer's policy did not run as often as it had to.
        """
        if not self.publishes:
            return
        if now:
            self._reading = self._read()
        elif self._reading is None and time.monotonic() >= self._next:
            self._reading = self._read()
            self._next = time.monotonic() + PERIOD
        if self._reading is not None and (now or self._reading[0].ready):
            (reading, asked), self._reading = self._reading, None
            report = reading.report()
            passes = {} if self._steps is None else self._steps.counts
            self._add(totals(report) | bytes_read(report, self._layers) | passes)
            if self._proof is not None:
                self._proof.check(report, asked)

    def _read(self) -> tuple[Reading, tuple[int, ...]]:
        return self._counters.reading(), () if self._proof is None else self._proof.asked

    def _add(self, current: dict[str, float]) -> None:
        for field, metric in _metrics(self._labels).items():
            metric.inc(max(0.0, current.get(field, 0.0) - self._last.get(field, 0.0)))
        self._last = current

    def forget(self) -> None:
        """The counters were reset."""
        self._last, self._reading = {}, None

    def enabled(self, value: bool) -> None:
        """Whether policies are on."""
        if self.publishes:
            _enabled(self._labels).set(float(value))

    def refused(self) -> None:
        """A change at run time was refused."""
        if self.publishes:
            _refusals(self._labels).inc()


def bytes_read(report: list[LayerReport], layers: list[Layer]) -> dict[str, float]:
    """Of experts, and of surrogates, over all layers: under native routing and really.

    An engine that holds copies of experts (EPLB) lets a token's place in the batch choose among them, and counters know
    experts, not copies. So there every copy counts as read, and none natively: no more is saved than this says.
    """
    natural = read = 0
    for row, layer in zip(report, layers, strict=True):
        experts = layer.experts
        natural += row.natural_union * experts.bytes
        read += (row.union + row.steps * experts.replicas) * experts.bytes + row.surrogates * layer.surrogate_bytes
        read -= row.bits_unread * experts.bit_bytes
    return {"natural_bytes": natural, "read_bytes": read}


@functools.cache  # a name may be registered once per process; engines of one model in one process add up
def _family(kind: str, name: str, text: str, **options: Any) -> Any:
    import prometheus_client

    return getattr(prometheus_client, kind)(name, text, LABELS, **options)


@functools.cache
def _metrics(labels: Labels) -> dict[str, Any]:
    return {
        field: _family("Counter", name, text.capitalize()).labels(*labels) for field, (name, text) in COUNTERS.items()
    }


def _refusals(labels: Labels) -> Any:
    return _family("Counter", "carpool_refusals", "Changes at run time that were refused").labels(*labels)


def prompts_only(labels: Labels) -> Any:
    """Of requests that end with their first token."""
    text = "Requests of one token (beam search, scoring), which are nothing but prompts and never share"
    return _family("Counter", "carpool_requests_prompt_only", text).labels(*labels)


def _enabled(labels: Labels) -> Any:
    return _family("Gauge", "carpool_enabled", "1 while policies are on", multiprocess_mode="livemostrecent").labels(
        *labels
    )
