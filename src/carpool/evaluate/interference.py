"""Interference: the same sequence beside many co-batches, and what its neighbours change (docs/isolation.md).

The sequences are dealt into batches anew `C` times, so each of them meets `C` sets of neighbours. Stock is measured the
same way: what it shows is the rounding of the kernels, the floor under every other number.

Shapes: `S` sequences, `D` decoded positions each, `R = S * D` tokens, `V` vocabulary, `C` deals, `Q` quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import compare, forward
from carpool.evaluate.loop import LOGITS_PER_PASS, ROWS_PER_PASS, MoE, require_reached
from carpool.evaluate.sequences import Sequences
from carpool.plans.pipeline import Outcome
from carpool.plans.policy_file import AnyPlan
from carpool.routing.batch import Batch

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
EDGES = tuple(10.0 ** (half / 2) for half in range(-16, 5))  # nats, of the histograms: 1e-8 to 100, two a decade
CONTEXT = 12  # tokens that show where the worst token stands


@dataclass(frozen=True)
class Spread:
    """How a non-negative quantity in nats is distributed over tokens and deals.

    Attributes:
        mean: over all. quantiles_Q: in the order of `QUANTILES`; the last is the worst.
        histogram: counts below the first of `EDGES`, between each two, and above the last.
    """

    mean: float
    quantiles_Q: tuple[float, ...]
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        given = values.double().cpu().numpy().ravel()
        bins = np.searchsorted(EDGES, given, side="right")
        return cls(
            float(given.mean()),
            tuple(float(value) for value in np.quantile(given, QUANTILES)),
            tuple(np.bincount(bins, minlength=len(EDGES) + 1).tolist()),
        )


@dataclass(frozen=True)
class Interference:
    """What neighbours do to a sequence under one plan.

    Attributes:
        plan: None is stock.
        layout: batch size, positions, grouping. sequences, deals: `S` and `C`.
        loss: KL(stock || policy) of every token beside every set of neighbours.
        between: KL(one deal || next deal) of every token: what other neighbours change.
        flipped: share of (token, deal) pairs whose likeliest next token is not stock's.
        unstable: share of tokens whose likeliest next token is not the same beside all neighbours.
        sequences_unstable: share of sequences with such a token.
        displaced: largest displaced mass of any row in any layer.
        worst_kl, worst_best_kl: `loss` of the token that lost most, and of the same token beside its best neighbours.
        worst_context: ids up to that token.
    """

    plan: AnyPlan | None
    layout: Layout
    sequences: int
    deals: int
    loss: Spread
    between: Spread
    flipped: float
    unstable: float
    sequences_unstable: float
    displaced: float
    worst_kl: float
    worst_best_kl: float
    worst_context: tuple[int, ...]

    @property
    def name(self) -> str:
        return "stock" if self.plan is None else str(self.plan)


def interference(
    model: Any,
    moe: MoE,
    plans: Sequence[AnyPlan],
    sequences: Sequences,
    layout: Layout,
    deals: int,
    *,
    seed: int = 0,
    stats: Any = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Interference]:
    """Stock first, then every plan, all of them over the same deals.

    Args:
        sequences: a whole number of batches, two at least, or the neighbours could not change.
        deals: `C`, two or more.
        advance: told the rows of every pass that is done.

    Raises:
        CarpoolError: a batch of one, too few sequences or deals, a plan that did not run or did not reach the experts,
            too many logits to keep.
    """
    count, vocabulary = len(sequences.ids_ST), model.config.get_text_config().vocab_size
    if layout.batch_size < 2 or deals < 2 or count % layout.batch_size or count < 2 * layout.batch_size:
        raise CarpoolError("interference needs batches of 2 or more, 2 batches or more, and 2 co-batches or more")
    if 3 * count * layout.decoded * vocabulary > LOGITS_PER_PASS * 4:
        raise CarpoolError("interference keeps all logits, which do not fit here: lower --tokens, or --batch")
    for plan in plans:
        plan.check(moe.experts, moe.top_k)
    run = _Run(model, moe, sequences.ids_ST, layout, stats, advance)
    order = torch.arange(count)
    stock_RV = run.logits(moe.stock, order)
    rng = np.random.default_rng(seed)
    dealt = [torch.from_numpy(rng.permutation(count)) for _ in range(deals)]
    return [_measure(run, plan, stock_RV, dealt) for plan in (None, *plans)]


@dataclass(eq=False)
class _Run:
    """A model and its sequences.

    Attributes:
        displaced, changed: largest displaced mass, and rows routed otherwise, since they were last set to 0.
    """

    model: Any
    moe: MoE
    ids_ST: Tensor
    layout: Layout
    stats: Any
    advance: Callable[[int], None]
    displaced: float = field(default=0.0)
    changed: int = field(default=0)

    def logits(self, plan: AnyPlan, order_S: Tensor) -> Tensor:
        """Logits `[R, V]` in the order of the sequences, which run in batches in the order given."""
        layout, made_S = self.layout, torch.empty(len(order_S), dtype=torch.int64)
        batches = max(1, ROWS_PER_PASS // (layout.batch_size * layout.positions))
        parts = []
        for chosen in order_S.split(batches * layout.batch_size):
            ids_ST = self.ids_ST[chosen, :-1]
            one = forward(
                self.model, plan, ids_ST, layout, num_layers=self.moe.layers, stats=self.stats, observe=self._observe
            )
            parts.append(one.logits_RV.view(len(chosen), layout.decoded, -1))
            self.advance(ids_ST.numel())
        made_S[order_S] = torch.arange(len(order_S))
        return torch.cat(parts)[made_S].flatten(0, 1)

    def _observe(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        self.displaced = max(self.displaced, float(outcome.displaced_N.max()))
        self.changed += int(outcome.changed_N.sum())


def _measure(run: _Run, plan: AnyPlan | None, stock_RV: Tensor, dealt: list[Tensor]) -> Interference:
    run.displaced, run.changed = 0.0, 0
    targets_R = run.ids_ST[:, run.layout.prefill + 1 :].flatten().to(stock_RV.device)
    losses, changes, agreements = list[Tensor](), list[Tensor](), list[Tensor]()
    before_RV: Tensor | None = None
    first_R, unstable_R = torch.empty(0), torch.zeros(len(stock_RV), dtype=torch.bool, device=stock_RV.device)
    for order in dealt:
        now_RV = run.logits(plan or run.moe.stock, order)
        found = compare(stock_RV, now_RV, targets_R)
        losses.append(found.kl_R)
        agreements.append(found.agree_R)
        if before_RV is None:
            first_R = now_RV.argmax(-1)
        else:
            changes.append(compare(before_RV, now_RV, targets_R).kl_R)
            unstable_R |= now_RV.argmax(-1) != first_R
        before_RV = now_RV
    loss_CR = torch.stack(losses)
    if plan is not None:
        require_reached(plan, run.changed, float(loss_CR.sum()))
    worst = int(loss_CR.amax(0).argmax())
    sequence, offset = divmod(worst, run.layout.decoded)
    end = run.layout.prefill + offset + 1
    return Interference(
        plan=plan,
        layout=run.layout,
        sequences=len(run.ids_ST),
        deals=len(dealt),
        loss=Spread.of(loss_CR),
        between=Spread.of(torch.stack(changes)),
        flipped=1 - float(torch.stack(agreements).mean()),
        unstable=float(unstable_R.float().mean()),
        sequences_unstable=float(unstable_R.view(len(run.ids_ST), -1).any(1).float().mean()),
        displaced=run.displaced,
        worst_kl=float(loss_CR[:, worst].max()),
        worst_best_kl=float(loss_CR[:, worst].min()),
        worst_context=tuple(run.ids_ST[sequence, max(0, end - CONTEXT) : end].tolist()),
    )


def as_dict(one: Interference, decode: Callable[[list[int]], str] | None = None) -> dict[str, Any]:
    """The JSON form; `decode` shows the worst token's context as text."""

    def spread(given: Spread) -> dict[str, Any]:
        named = {f"p{100 * q:g}": value for q, value in zip(QUANTILES, given.quantiles_Q, strict=True)}
        return {"mean": given.mean, "quantiles": named, "histogram": list(given.histogram)}

    return {
        "policy": one.name,
        "group": str(one.layout.grouping),
        "batch": one.layout.batch_size,
        "sequences": one.sequences,
        "co_batches": one.deals,
        "tokens": one.sequences * one.layout.decoded,
        "kl": spread(one.loss),
        "kl_between_co_batches": spread(one.between),
        "flipped_greedy": one.flipped,
        "unstable_greedy": one.unstable,
        "unstable_sequences": one.sequences_unstable,
        "worst_displaced_mass": one.displaced,
        "worst_token": {
            "kl": one.worst_kl,
            "kl_beside_its_best_neighbours": one.worst_best_kl,
            "text": None if decode is None else decode(list(one.worst_context)),
        },
    }
