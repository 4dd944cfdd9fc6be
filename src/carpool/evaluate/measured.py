"""What is kept of a plan: one sum a batch, from which everything else follows.

Shapes: `M` batches, `S` sequences of a pass, `R` compared tokens, `L` MoE layers, `D` domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from carpool.evaluate.details import Details
from carpool.evaluate.intervals import Array
from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.lockstep import LAYER_FIELDS, Comparison
from carpool.plans.policy_file import AnyPlan


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums of one plan at one batch size.

    Attributes:
        plan: None is stock.
        layout: batch size, positions, grouping.
        domains: names, `D` of them.
        layers: by field of `LAYER_FIELDS`, sums over the decoding steps of each batch, `[M, L]`.
        kl_M, agree_M: sums over the compared tokens of each batch.
        nll_MD, tokens_MD: negative log-likelihood and compared tokens by domain.
        details: which experts each domain reads, and the rows that lose most; None where nobody asked.
    """

    plan: AnyPlan | None
    layout: Layout
    domains: tuple[str, ...]
    layers: dict[str, Array]
    kl_M: Array
    agree_M: Array
    nll_MD: Array
    tokens_MD: Array
    details: Details | None = None

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


class Tally:
    """Sums of one plan, pass by pass."""

    def __init__(self, plan: AnyPlan | None, layout: Layout, domains: tuple[str, ...]) -> None:
        self.plan, self.layout, self.domains = plan, layout, domains
        self.layers: list[Tensor] = []
        self.tokens: list[Array] = []

    def add(self, part: Part, found: Comparison, layers_LFM: Tensor) -> None:
        sequences, decoded = part.targets_SD.shape
        sequence_R = part.counted(torch.arange(sequences).repeat_interleave(decoded))
        columns_RX = torch.stack([x.cpu() for x in (found.kl_R, found.agree_R, found.nll_R)], 1)
        columns_RX = torch.cat([columns_RX, torch.ones(len(columns_RX), 1, dtype=torch.float64)], 1)
        sums_SX = torch.zeros(sequences, 4, dtype=torch.float64).index_add_(0, sequence_R, columns_RX)
        one_hot_SD = torch.nn.functional.one_hot(part.domain_S, len(self.domains)).double()
        parts = [sums_SX[:, :2], one_hot_SD * sums_SX[:, 2:3], one_hot_SD * sums_SX[:, 3:]]
        self.tokens.append(torch.cat(parts, 1).unflatten(0, (-1, self.layout.batch_size)).sum(1).numpy())
        self.layers.append(layers_LFM)

    def result(self) -> Measured:
        fields_LFM, tokens_MX = torch.cat(self.layers, dim=-1).numpy(), np.concatenate(self.tokens)
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
        )
