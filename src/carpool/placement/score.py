"""What a placement does to a trace, by replaying it: loads, activated experts, fan-out, hops, and bytes by dispatch.

`T` rows, `L` MoE layers, `K` experts per token, `D` devices, `X` steps. Counts, not times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.errors import CarpoolError
from carpool.placement.dispatch import WAYS, nodes_sent, on_ND, rows_sent
from carpool.placement.placement import Placement
from carpool.placement.replicas import device_NK

Counts = list[tuple[Tensor, Tensor]]  # by layer: activated experts and pairs, int64 [X, D]


@dataclass(frozen=True)
class Score:
    """Means over layers and steps (and rows, where it says so).

    Attributes:
        peak_tokens: (row, expert) pairs of the busiest device over the mean of all; 1 is even.
        peak_activated: experts that the busiest device computes. mean_activated: of all devices.
        fan_out: devices that compute something for a row. node_rows: hidden states of a row that leave its node.
        hops: share of rows whose best expert is on another device than in the layer before; nan with one layer.
        node_hops: the same for nodes.
        rows_sent: hidden states of a row that leave its device, by dispatch; twice as many where they come back.
    """

    peak_tokens: float
    peak_activated: float
    mean_activated: float
    fan_out: float
    node_rows: float
    hops: float
    node_hops: float
    rows_sent: dict[str, float]

    def bytes_sent(self, dispatch: str, hidden_size: int, token_bytes: int = 2) -> float:
        """Of a row in one layer, both ways."""
        return self.rows_sent[dispatch] * hidden_size * token_bytes * (1 if dispatch == "coherent" else 2)


def require_fit(placement: Placement, trace: Trace) -> None:
    """Raises CarpoolError unless the placement places the trace's experts."""
    if (placement.layers, placement.num_experts) != (trace.num_layers, trace.num_experts):
        raise CarpoolError(
            f"the placement is of {placement.layers} layers of {placement.num_experts} experts, the trace of "
            f"{trace.num_layers} layers of {trace.num_experts}: plan from a trace of this model"
        )


def devices_of(placement: Placement, trace: Trace, layer: int, rule: str = "hash") -> Tensor:
    """The device that computes each pair of the layer at this place, int64 `[T, K]`; -1: a free slot."""
    ids_TK = trace.experts_TLK[:, layer].long()
    weights = trace.weights_TLK
    asked_TK = torch.ones_like(ids_TK, dtype=torch.bool) if weights is None else weights[:, layer] != 0
    step_T, row_T = places(trace)
    return device_NK(ids_TK, asked_TK, placement.holds_LDE[layer], step_T, row_T, rule)


def places(trace: Trace) -> tuple[Tensor, Tensor]:
    """Number of each row's step, from 0 on without gaps, and the row's place in it, int64 `[T]`."""
    _, step_T, count_X = trace.step_T.unique_consecutive(return_inverse=True, return_counts=True)
    first_X = count_X.cumsum(0) - count_X
    return step_T, torch.arange(len(trace)) - first_X[step_T]


def score(placement: Placement, trace: Trace, rule: str = "hash") -> Score:
    """Replay a trace under a placement; rows are at home on the devices in turn by request.

    Args:
        rule: which replica computes (`carpool.placement.replicas.RULES`).

    Raises:
        CarpoolError: a placement of another model.
    """
    return score_of(placement, trace, chosen(placement, trace, rule))


def chosen(placement: Placement, trace: Trace, rule: str = "hash") -> list[Tensor]:
    """By layer: the device that computes each pair (`devices_of`); raises as `require_fit`."""
    require_fit(placement, trace)
    return [devices_of(placement, trace, layer, rule) for layer in range(trace.num_layers)]


def score_of(placement: Placement, trace: Trace, chosen_LTK: list[Tensor]) -> Score:
    """The score of a replay that `chosen` made."""
    devices, nodes = placement.devices, placement.nodes
    home_T = trace.request_T.long() % devices
    counted = counts(placement, trace, chosen_LTK)
    pairs = torch.stack([pairs_XD for _, pairs_XD in counted]).double()
    activated = torch.stack([activated_XD for activated_XD, _ in counted]).double()
    rows = len(trace) * trace.num_layers
    best_LT = torch.stack([chosen_TK[:, 0] for chosen_TK in chosen_LTK])
    return Score(
        peak_tokens=float((pairs.amax(-1) / pairs.mean(-1).clamp_min(1e-9)).mean()),
        peak_activated=float(activated.amax(-1).mean()),
        mean_activated=float(activated.mean()),
        fan_out=sum(int(on_ND(one, devices).sum()) for one in chosen_LTK) / rows,
        node_rows=sum(nodes_sent(one, home_T, devices, nodes) for one in chosen_LTK) / rows,
        hops=_hops(best_LT),
        node_hops=_hops(best_LT // (devices // nodes)),
        rows_sent={
            name: sum(rows_sent(name, one, home_T, devices) for one in chosen_LTK) / rows
            for name in WAYS if name != "coherent"
        } | {"coherent": _hops(best_LT)},
    )  # fmt: skip


def _hops(best_LT: Tensor) -> float:
    return float((best_LT[1:] != best_LT[:-1]).double().mean()) if len(best_LT) > 1 else float("nan")


def counts(placement: Placement, trace: Trace, chosen_LTK: list[Tensor]) -> Counts:
    """By layer: experts that each device computes in each step, and pairs, int64 `[X, D]`."""
    step_T, _ = places(trace)
    steps, devices, experts = int(step_T[-1]) + 1, placement.devices, placement.num_experts
    found: Counts = []
    for layer, chosen_TK in enumerate(chosen_LTK):
        asked_TK = chosen_TK >= 0
        place = (step_T.unsqueeze(1) * devices + chosen_TK)[asked_TK]
        pairs_XD = place.bincount(minlength=steps * devices).view(steps, devices)
        active = torch.zeros(steps * devices * experts, dtype=torch.bool)
        active[place * experts + trace.experts_TLK[:, layer].long()[asked_TK]] = True
        found.append((active.view(steps, devices, experts).sum(-1), pairs_XD))
    return found
