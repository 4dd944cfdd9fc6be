"""What an evaluation shows beyond means: who uses which expert, and the rows that lose most.

Shapes: `D` domains, `L` MoE layers, `E` experts, `R` decoded rows of a pass, `N` all rows of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import nlargest

import torch
from torch import Tensor

from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.lockstep import Comparison
from carpool.plans.pipeline import Outcome
from carpool.routing.batch import Batch

BINS = 50  # of the histogram of displaced mass, over [0, 1]
WORST = 10  # rows that are kept
CONTEXT = 12  # tokens that show where such a row stands


@dataclass(frozen=True)
class Row:
    """A decoded token.

    Attributes:
        displaced: its displaced mass, mean over layers. kl: KL(stock || policy) of its prediction, nats.
        domain: index of its domain. context: token ids up to itself.
    """

    displaced: float
    kl: float
    domain: int
    context: tuple[int, ...]


@dataclass(eq=False)
class Details:
    """Filled pass by pass: `begin`, one call a layer, `finish`.

    Attributes:
        use_DLE: int64, decoded rows of a domain that read an expert.
        histogram_B: int64, (row, layer) pairs by displaced mass.
        worst: the rows with the largest displaced mass, the worst first.
    """

    use_DLE: Tensor
    histogram_B: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    worst: tuple[Row, ...] = ()

    @classmethod
    def empty(cls, domains: int, layers: int, experts: int) -> Details:
        """Nothing seen yet."""
        return cls(torch.zeros(domains, layers, experts, dtype=torch.int64))

    def begin(self, layout: Layout, part: Part) -> None:
        """Before a pass."""
        self._layout, self._domain_S = layout, part.domain_S
        self._displaced_R: Tensor | None = None

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        """Take in one layer of the pass."""
        displaced_R, computed_RE = self._decoded(outcome.displaced_N), self._decoded(outcome.computed_NE)
        one_hot_RD = torch.nn.functional.one_hot(self._domain_R, len(self.use_DLE)).float().to(computed_RE.device)
        self.use_DLE[:, layer] += (one_hot_RD.T @ computed_RE.float()).round().long().cpu()
        bins_R = (displaced_R.double() * BINS).long().clamp(0, BINS - 1)
        self.histogram_B += torch.bincount(bins_R, minlength=BINS).cpu()
        self._displaced_R = displaced_R if self._displaced_R is None else self._displaced_R + displaced_R

    def finish(self, part: Part, found: Comparison) -> None:
        """After the pass, all of whose decoded rows were compared."""
        ids_ST, kl_R = part.ids_SX, found.kl_R
        assert self._displaced_R is not None
        mean_R = self._displaced_R.double() / self.use_DLE.shape[1]
        most = mean_R.topk(min(WORST, len(mean_R)))
        rows = [*self.worst]
        for displaced, index in zip(most.values.tolist(), most.indices.tolist(), strict=True):
            sequence, offset = divmod(index, self._layout.decoded)
            position = self._layout.prefill + offset
            context = ids_ST[sequence, max(0, position + 1 - CONTEXT) : position + 1].tolist()
            rows.append(Row(displaced, float(kl_R[index]), int(self._domain_S[sequence]), tuple(context)))
        self.worst = tuple(nlargest(WORST, rows, key=lambda row: row.displaced))

    @property
    def _domain_R(self) -> Tensor:
        return self._domain_S.repeat_interleave(self._layout.decoded)

    def _decoded(self, values_N: Tensor) -> Tensor:
        """The decoded rows of a pass, `[R, ...]`."""
        layout = self._layout
        shaped = values_N.view(-1, layout.positions, *values_N.shape[1:])
        return shaped[:, layout.prefill :].flatten(0, 1)
