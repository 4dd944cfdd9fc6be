"""SciPy's solvers, imported when one is asked for (`carpool[placement]`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError


def _scipy(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"scipy.{module}")
    except ImportError:
        raise CarpoolError("this planner needs SciPy: pip install 'carpool[placement]'") from None


def assign(gain_II: Tensor) -> Tensor:
    """The column of every row, int64, each once, so that the sum of `gain` is as large as it can be.

    Raises:
        CarpoolError: SciPy is missing.
    """
    rows, columns = _scipy("optimize").linear_sum_assignment(gain_II.numpy(), maximize=True)
    return torch.from_numpy(columns)[torch.from_numpy(rows).argsort()]


def maximum_flow(begin: Tensor, end: Tensor, capacity: Tensor, source: int, sink: int) -> int:
    """Of a graph whose edges go from `begin` to `end`, node numbers from 0 on.

    Raises:
        CarpoolError: SciPy is missing.
    """
    nodes = 1 + int(torch.cat([begin, end]).max())
    pieces = (capacity.int().numpy(), (begin.int().numpy(), end.int().numpy()))
    graph = _scipy("sparse").csr_array(pieces, shape=(nodes, nodes))
    return int(_scipy("sparse.csgraph").maximum_flow(graph, source, sink).flow_value)


@dataclass(frozen=True, eq=False)
class Solved:
    """What an integer programme came to.

    Attributes:
        x: float64, the best point that was found; None: none was.
        value: of the objective there. bound: nothing has less. optimal: which is proved.
    """

    x: Tensor | None
    value: float
    bound: float
    optimal: bool


def minimise(
    cost: Tensor, integer: Tensor, equal: tuple[Any, Tensor], at_most: tuple[Any, Tensor], seconds: float
) -> Solved:
    """Least `cost @ x` over `0 <= x <= 1`, whole where `integer`, with `equal[0] @ x == equal[1]` and `at_most[0] @ x`
    at most `at_most[1]` (matrices as triples of row, column, value), by HiGHS.

    What is found within a limit of time depends on the machine: use it for certificates, off line, never on every rank.

    Raises:
        CarpoolError: SciPy is missing.
    """
    optimize, sparse = _scipy("optimize"), _scipy("sparse")

    def constraint(part: tuple[Any, Tensor], low: bool) -> Any:
        (row, column, value), bound = part
        shape = (len(bound), len(cost))
        matrix = sparse.csr_array((value.double().numpy(), (row.numpy(), column.numpy())), shape=shape)
        limit = bound.double().numpy()
        return optimize.LinearConstraint(matrix, limit if low else -float("inf"), limit)

    found = optimize.milp(
        cost.double().numpy(), integrality=integer.int().numpy(), bounds=optimize.Bounds(0, 1),
        constraints=[constraint(equal, True), constraint(at_most, False)], options={"time_limit": seconds},
    )  # fmt: skip
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else -float("inf")
    x = None if found.x is None else torch.from_numpy(found.x)
    return Solved(x, float("inf") if x is None else float(found.fun), float(bound), found.status == 0)
