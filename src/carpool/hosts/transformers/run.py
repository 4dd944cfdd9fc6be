"""`share`: a model under a policy, for the length of a `with` block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.as_stored import planes_of, shares_stored
from carpool.hosts.transformers.forward import Forward, Observer, Tally, Terms, never_fired
from carpool.hosts.transformers.forward_rows import RowRules, build_batch
from carpool.hosts.transformers.hooks import Attachment, attach, uncompiled
from carpool.hosts.transformers.inside import bound, entered_from
from carpool.hosts.transformers.known import Known
from carpool.hosts.transformers.layers import MoELayer, find_layers
from carpool.hosts.transformers.plans import Prepared, prepare
from carpool.plans.counters import LayerReport
from carpool.plans.grammar import Plan, parse
from carpool.plans.policy_file import PolicyFile, plan_or_file
from carpool.plans.summary import Report, Summary
from carpool.policies.base import Policy
from carpool.routing.batch import Batch, Grouping

if TYPE_CHECKING:
    from carpool.artefacts.statistics import Statistics

F = TypeVar("F", bound=Callable[..., Any])
OUTSIDE = (
    ", or it ran in another thread or task, or while a generator was suspended in the block: bind what runs there with "
    "run.here"
)


class _Mine(threading.local):
    """What one thread says and counts in a run."""

    def __init__(self, layers: list[MoELayer], batch: Batch | None, tallies: list[Tally]) -> None:
        self.batch = batch
        self.known: Known | None = None
        self.tally = Tally(layers)
        tallies.append(self.tally)


class Run:
    """What happens while a model shares experts.

    A forward is the run's if the block, or a function that `here` has bound to it, has called it, however deep. All
    others are stock: those of other threads and tasks, and what runs while the block is suspended in a generator.

    Attributes:
        plan: the policy and its guards (layers may have settings of their own).
        layers: the model's MoE layers.
        frames: see `carpool.hosts.transformers.inside`.
    """

    def __init__(
        self,
        attachment: Attachment,
        layers: list[MoELayer],
        policies: PolicyFile,
        rules: RowRules,
        prepared: list[Prepared],
        batch: Batch | None,
        observe: Observer | None,
    ) -> None:
        self.plan, self.layers, self._name = policies.plan, layers, str(policies)
        self.frames: dict[int, FrameType] = {}
        self.closed = False
        self._attachment, self._rules = attachment, rules
        self._terms = Terms(layers, prepared, observe)
        self._tallies: list[Tally] = []
        self._mine = _Mine(layers, batch, self._tallies)

    @property
    def batch(self) -> Batch | None:
        """If set, the rows of every following forward of this thread; None reads them from the forward's arguments."""
        return self._mine.batch

    @batch.setter
    def batch(self, batch: Batch | None) -> None:
        self._mine.batch = batch

    @property
    def known(self) -> Known | None:
        """What a loop of your own knows of the rows of the following forwards of this thread (see `Known`); `generate`
        says it by itself."""
        return self._mine.known

    @known.setter
    def known(self, known: Known | None) -> None:
        self._mine.known = known

    @property
    def grouping(self) -> Grouping:
        """Which rows share, for loops that set `batch` themselves."""
        return self._rules.grouping

    def here(self, function: F) -> F:
        """The function, bound to this block: its forwards are the run's wherever it is called.

        `Thread(target=run.here(model.generate), kwargs=...)` streams; a task, an executor or a generator that goes on
        elsewhere is bound in the same way. What it runs must end before the block does.

        Raises:
            CarpoolError: an asynchronous generator. When the function runs: the block was left, or another one of the
                same model is open where it is called.
        """
        return bound(function, lambda frame: self._attachment.inside(self, {id(frame): frame}))

    def report(self) -> Report:
        """Totals of every layer since the run began: a list that prints as a table."""
        return Report(_sum(rows) for rows in zip(*(tally.report() for tally in self._tallies), strict=True))

    def summary(self) -> Summary:
        """What happened so far, over all layers; `print(run)` shows it, and so does a notebook."""
        shares = self.surrogate_shares()
        sizes = [(size, size * share) for size, share in zip(self._expert_bytes(), shares, strict=True)]
        whole = zip(*(tally.whole_experts(tally.report()) for tally in self._tallies), strict=True)
        return Summary.of(self._name, str(self.grouping), self.report(), sizes, [sum(one) for one in whole])

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def changed_rows(self) -> int:
        """Rows, summed over layers, that were routed otherwise than natively."""
        return sum(layer.rows_changed for layer in self.report())

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward:
        """The state of a forward that begins with these arguments."""
        self.check_open()
        loops, batch = self._attachment.here.loops, self.batch
        known = loops[-1].known(kwargs) if loops else None
        if batch is None:
            batch = build_batch(self._rules, args, kwargs, self.known if known is None else known)
        return Forward(self._terms, self._mine.tally, batch, early=bool(loops) and loops[-1].drafts)

    def loose(self) -> Forward:
        """The state of a layer that is called outside of the model's forward."""
        self.check_open()
        return Forward(self._terms, self._mine.tally, self.batch)

    def expert_sizes(self) -> list[Tensor]:
        """What reading an expert at a depth takes over its bytes as the checkpoint stores it (in 16 bits where that is
        not quantised), by layer, float64 `[17]` by depth."""
        return [one.sizes for one in self._terms.prepared]

    def surrogate_shares(self) -> list[float]:
        """Bytes of one surrogate over those of one expert, by layer; 0 without surrogates."""
        return [
            0.0 if prepared.surrogates is None else prepared.surrogates.bytes / size
            for size, prepared in zip(self._expert_bytes(), self._terms.prepared, strict=True)
        ]

    def _expert_bytes(self) -> list[float]:
        """Of one expert of every layer, as the checkpoint stores it; at most two a number, or a model held in fp32
        would make its surrogates look small."""
        return [
            prepared.native * 2 * layer.expert_numbers
            for layer, prepared in zip(self.layers, self._terms.prepared, strict=True)
        ]  # fmt: skip

    def check_open(self) -> None:
        """Raises CarpoolError if the block was left."""
        if self.closed:
            raise CarpoolError(
                f"the block that shares under {self.plan} was left while something bound to it by run.here still ran; "
                "join the thread, or finish the task or stream, inside the block"
            )


def share(
    model: nn.Module,
    plan: str | Path | Policy | Plan | PolicyFile,
    *,
    group: str | Grouping = "batch",
    stats: str | Path | Statistics | None = None,
    batch: Batch | None = None,
    observe: Observer | None = None,
    exempt_prefill: bool = True,
) -> AbstractContextManager[Run]:
    """Let the rows of a model's batches share experts inside a `with` block; outside it the model is stock.

    Inside is what the block calls, however deep. Forwards of other threads and tasks are stock, and so is what runs
    while a generator or coroutine is suspended in its block; `Run.here` binds functions that are called there.

    Args:
        model: a transformers model of a known family; compile it after it was shared once, if at all: compiled code
            does not see hooks that come later.
        plan: a policy with guards, such as `"xshare(budget=16) | floor(0.3)"`, the path of a policy file, or either as
            an object.
        group: which rows share: `batch`, `prompt` (samples that one call of `generate` made of one prompt),
            `request` (a row of the batch), `block:n`, or `position` (a forward over several positions stands for as
            many decoding steps).
        stats: statistics of `carpool calibrate`, for policies that need them; a policy file names its own, and those
            of an installed reference model are found by its fingerprint.
        batch: who the rows of the next forwards are, instead of reading it from their arguments.
        observe: called after every layer's routing with the layer's place, the batch and the outcome.
        exempt_prefill: rows of a prompt keep their native routing. docs/rows.md says which they are.

    Raises:
        CarpoolError: a plan or grouping that cannot be read, or is impossible for the model, at once; on entering, a
            model that cannot be shared, statistics that are missing or foreign, a block inside another of the same
            model or of a part of it; on leaving, a router that was not called in a forward, or in none at all.
    """
    if isinstance(plan, str | Path):
        plan = plan_or_file(plan) if isinstance(plan, str) else PolicyFile.load(plan)
    policies, grouping = plan if isinstance(plan, PolicyFile) else PolicyFile(parse(plan)), Grouping.parse(group)
    for layer in find_layers(uncompiled(model)):
        policies.plan_for(layer.index).check(layer.num_experts, layer.top_k)
    return _sharing(model, policies, grouping, stats, batch, observe, exempt_prefill)


@contextmanager
def _sharing(
    model: nn.Module,
    policies: PolicyFile,
    grouping: Grouping,
    stats: str | Path | Statistics | None,
    batch: Batch | None,
    observe: Observer | None,
    exempt_prefill: bool,
) -> Iterator[Run]:
    """The block itself: see `share`."""
    frames = entered_from(sys._getframe())
    with torch.inference_mode(False):  # what is made here serves in any mode
        attachment, layers = attach(model), find_layers(uncompiled(model))
        prepared = prepare(policies, layers, stats, planes_of(model), shares_stored(model, layers))
        rules = RowRules(grouping, exempt_prefill, _endings(model) if _votes_matter(grouping, prepared) else ())
        run = Run(attachment, layers, policies, rules, prepared, batch, observe)
    with attachment.inside(run, frames):
        try:
            yield run
        finally:
            run.closed = True
    # only where the block did not raise: an error of the user's own must not be hidden
    silent = [layer for layer, row in zip(run.layers, run.report(), strict=True) if row.calls == 0]
    if silent:
        raise never_fired(silent, "the whole block", OUTSIDE)


def _sum(rows: tuple[LayerReport, ...]) -> LayerReport:
    sums: dict[str, Any] = {one.name: sum(getattr(row, one.name) for row in rows) for one in fields(LayerReport)[1:]}
    return LayerReport(rows[0].layer, **sums)


def _votes_matter(grouping: Grouping, prepared: list[Prepared]) -> bool:
    """Whether a sequence that has ended could change what others read."""
    return grouping.kind in ("batch", "prompt") and any(layer.plan.policy.kind == "group" for layer in prepared)


def _endings(model: nn.Module) -> tuple[int, ...]:
    """What `generate` feeds sequences that have ended: the pad token, or an end token where there is none."""
    for name in ("pad_token_id", "eos_token_id"):
        for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            token = getattr(settings, name, None)
            if token is not None:
                return tuple(token) if isinstance(token, list) else (token,)
    return ()
