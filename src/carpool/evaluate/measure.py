"""Runs stock and policies over the same batches and keeps one sum a batch, from which everything else follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.evaluate.details import Details
from carpool.evaluate.intervals import Array
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS, Pass, compare, forward
from carpool.evaluate.sequences import Sequences
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


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums of one plan at one batch size.

    Attributes:
        plan: None is stock.
        layout: batch size, positions, grouping.
        domains: names, `D` of them.
        layers: by field of `LAYER_FIELDS`, sums over the decoding steps of each batch, `[M, L]`.
        kl_M, agree_M: sums over the decoded tokens of each batch.
        nll_MD, tokens_MD: negative log-likelihood and decoded tokens by domain.
        details: which experts each domain reads, and the rows that lose most.
    """

    plan: AnyPlan | None
    layout: Layout
    domains: tuple[str, ...]
    layers: dict[str, Array]
    kl_M: Array
    agree_M: Array
    nll_MD: Array
    tokens_MD: Array
    details: Details

    @property
    def name(self) -> str:
        return "stock" if self.plan is None else str(self.plan)

    @property
    def batches(self) -> int:
        return len(self.kl_M)

    @property
    def tokens_M(self) -> Array:
        return self.tokens_MD.sum(1)

    @property
    def changed_rows(self) -> int:
        """(Row, layer) pairs whose routing differs from the native one."""
        return int(self.layers["changed"].sum())


def measure(
    model: Any,
    moe: MoE,
    plans: Sequence[AnyPlan],
    sequences: Sequences,
    layout: Layout,
    batches: int,
    *,
    stats: Any = None,
    allow_unchanged: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Measured]:
    """Stock first, then every plan, over the first `batches * B` sequences.

    Args:
        advance: told the rows of every pass that is done.

    Raises:
        CarpoolError: a plan that does not fit the model, did not run, or should act and changed no row; counting
            stock's union changed its logits; logits that are not finite; not enough memory.
    """
    for plan in plans:
        plan.check(moe.experts, moe.top_k)
    tallies = [_Tally(plan, layout, sequences, moe) for plan in (None, *plans)]
    with explaining_memory(layout):
        for ids_SX, domain_S in passes(model, sequences, layout, batches):
            stock = None
            for tally in tallies:
                plan = tally.plan or moe.stock
                tally.details.begin(layout, domain_S)
                run = forward(
                    model, plan, ids_SX[:, :-1], layout, num_layers=moe.layers, stats=stats, observe=tally.details
                )
                if stock is None:
                    stock = run
                    if not tally.layers:
                        _require_untouched(model, ids_SX, layout, stock)
                tally.add(stock, run, ids_SX, domain_S)
                advance(len(ids_SX) * layout.positions)
    measured = [tally.result() for tally in tallies]
    if not allow_unchanged:
        for result in measured[1:]:
            _require_changed(result, measured[0], moe)
    return measured


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


def passes(model: Any, sequences: Sequences, layout: Layout, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Sequences and their domains of every forward pass, as many whole batches together as memory allows.

    Raises:
        CarpoolError: fewer sequences than `batches` batches need.
    """
    vocabulary = model.config.get_text_config().vocab_size
    logits = layout.batch_size * layout.decoded * vocabulary
    stacked = max(1, min(ROWS_PER_PASS // (layout.batch_size * layout.positions), LOGITS_PER_PASS // logits))
    needed = batches * layout.batch_size
    if needed > len(sequences.ids_ST):
        raise CarpoolError(
            f"{batches} batches of {layout.batch_size} need {needed} sequences, not {len(sequences.ids_ST)}"
        )
    size = stacked * layout.batch_size
    return list(
        zip(sequences.ids_ST[:needed].split(size), sequences.domain_S[:needed].split(size), strict=True)
    )  # the last pass may hold fewer batches


def _require_untouched(model: Any, ids_SX: Tensor, layout: Layout, stock: Pass) -> None:
    with torch.inference_mode():
        plain_RV = layout.logits(model, ids_SX[:, :-1].to(stock.logits_RV.device))
    if not torch.equal(plain_RV, stock.logits_RV):
        raise CarpoolError("counting the experts that stock reads changed the model's logits; please report this model")


def _require_changed(result: Measured, stock: Measured, moe: MoE) -> None:
    """A plan that should act must have changed rows, else nothing was measured."""
    if result.changed_rows or result.plan is None:
        return
    voters = result.layout.batch_size * result.layout.stride // result.layout.groups
    plans = result.plan.plans if isinstance(result.plan, PolicyFile) else [result.plan]
    limits = [plan.policy.limit(moe.experts, moe.top_k) for plan in plans]
    fits = all(isinstance(limit, int) and limit >= min(moe.experts, voters * moe.top_k) for limit in limits)
    waits = result.plan.policy.kind == "group" and any(
        isinstance(guard, MinBatch) and guard.voters > voters for guard in result.plan.guards
    )
    if not fits and not waits:
        raise CarpoolError(
            f"{result.plan} changed no row at batch {result.layout.batch_size} grouped by {result.layout.grouping}: "
            "it is an identity setting or did nothing; pass --allow-unchanged if that is what you want to measure"
        )


class _Tally:
    def __init__(self, plan: AnyPlan | None, layout: Layout, sequences: Sequences, moe: MoE) -> None:
        self.plan, self.layout, self.domains = plan, layout, sequences.domains
        self.details = Details.empty(len(sequences.domains), moe.layers, moe.experts)
        self.layers: list[Tensor] = []
        self.tokens: list[Array] = []

    def add(self, stock: Pass, run: Pass, ids_SX: Tensor, domain_S: Tensor) -> None:
        layout = self.layout
        targets_R = ids_SX[:, layout.prefill + 1 :].flatten().to(run.logits_RV.device)
        found = compare(stock.logits_RV, run.logits_RV, targets_R)
        self.details.finish(ids_SX[:, :-1], found.kl_R)
        by_sequence = [x.view(-1, layout.decoded).sum(1).cpu() for x in (found.kl_R, found.agree_R, found.nll_R)]
        one_hot_SD = torch.nn.functional.one_hot(domain_S, len(self.domains)).double()
        columns = torch.cat(
            [
                torch.stack(by_sequence[:2], 1),
                one_hot_SD * by_sequence[2].unsqueeze(1),
                one_hot_SD * layout.decoded,
            ],
            dim=1,
        )
        self.tokens.append(columns.unflatten(0, (-1, layout.batch_size)).sum(1).numpy())
        self.layers.append(run.layers_LFM.cpu())

    def result(self) -> Measured:
        fields_LFM = torch.cat(self.layers, dim=-1).numpy()
        tokens_MX = np.concatenate(self.tokens)
        count = len(self.domains)
        return Measured(
            plan=self.plan,
            layout=self.layout,
            domains=self.domains,
            layers={name: fields_LFM[:, index].T for index, name in enumerate(LAYER_FIELDS)},
            kl_M=tokens_MX[:, 0],
            agree_M=tokens_MX[:, 1],
            nll_MD=tokens_MX[:, 2 : 2 + count],
            tokens_MD=tokens_MX[:, 2 + count :],
            details=self.details,
        )
