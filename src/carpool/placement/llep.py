"""LLEP: tokens of overloaded experts are computed on less loaded devices, to which the expert's weights are sent
(arXiv 2601.17111). For prefill and training, where a step has thousands of tokens; decoding does not repay the weights.

`E` experts, `D` devices, `X` segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.errors import CarpoolError
from carpool.placement.demand import loads_LE


@dataclass(frozen=True, eq=False)
class Spill:
    """Who computes which tokens of a step.

    Attributes:
        segments_X4: int64 rows of expert, device, first token and end: places in the order of the expert's tokens over
            all ranks. Sorted by expert, then by first token; together they hold every token once.
        home_E: int64, the device that holds each expert.
        cap: tokens that a device should not exceed.
        bound: `ceil(tokens / devices)`: no placement has a smaller peak.
        standard: the load was even enough, and nothing is moved.
    """

    segments_X4: Tensor
    home_E: Tensor
    devices: int
    cap: int
    bound: int
    standard: bool

    @property
    def loads_D(self) -> Tensor:
        """Int64: tokens of each device."""
        _, device_X, first_X, end_X = self.segments_X4.T
        return torch.zeros(self.devices, dtype=torch.int64).scatter_add_(0, device_X, end_X - first_X)

    @property
    def moves_X2(self) -> Tensor:
        """Int64 `[., 2]`: expert and device to which its weights are sent, each pair once, sorted."""
        expert_X, device_X = self.segments_X4[:, 0], self.segments_X4[:, 1]
        return self.segments_X4[device_X != self.home_E[expert_X], :2].unique(dim=0)

    def peak_bytes(self, token_bytes: int, expert_bytes: int) -> int:
        """Of the device that needs most for its tokens and for experts that it got."""
        got_D = self.moves_X2[:, 1].bincount(minlength=self.devices)
        return int((self.loads_D * token_bytes + got_D * expert_bytes).max())


def least_loaded(
    tokens_E: Tensor, home_E: Tensor, devices: int, *, alpha: float = 1.0, least: int = 1024, ratio: float = 1.3,
    most_foreign: int | None = None, keep_small: bool = False,
) -> Spill:  # fmt: skip
    """Spread a step's tokens so that no device has many more than its share (the paper's algorithms 2 to 4).

    Experts go by tokens, most first. One keeps what fits under its own device's cap; the rest goes to the least
    loaded other device, in pieces of at least `least` tokens, and all of it to the least loaded one where no piece
    fits. Deterministic, greedy: the peak may exceed the cap by such forced pieces.

    Args:
        tokens_E: tokens of each expert in the step. home_E: the device that holds it.
        alpha: cap over the mean tokens of a device, 1 or more.
        least: fewer tokens are not worth an expert's weights.
        ratio: if the busiest device has less than so many times the mean, nothing is moved. The paper's text compares
            experts, its code devices; this compares devices (experts are hardly ever even).
        most_foreign: experts that a device has memory for beside its own; None: any number. What finds no room stays.
        keep_small: an excess below `least` stays at home, as the text of the paper says; its code sends it away.

    Raises:
        CarpoolError: impossible numbers.
    """
    _require(tokens_E, home_E, devices, alpha, least, most_foreign)
    total = int(tokens_E.sum())
    bound = -(-total // devices)
    native_D = torch.zeros(devices, dtype=torch.int64).scatter_add_(0, home_E, tokens_E)
    cap = max(bound, int(alpha * total / devices))
    if int(native_D.max()) * devices < ratio * total or total == 0:
        rows = [(e, int(home_E[e]), 0, int(tokens_E[e])) for e in range(len(tokens_E)) if tokens_E[e]]
        return Spill(torch.tensor(rows, dtype=torch.int64).view(-1, 4), home_E, devices, cap, bound, True)
    state = _State(native_D.tolist(), [0] * devices, [most_foreign if most_foreign is not None else total] * devices)
    rows = []
    for expert in tokens_E.argsort(descending=True, stable=True).tolist():
        count, home = int(tokens_E[expert]), int(home_E[expert])
        if not count:
            continue
        state.pending[home] -= count
        kept = min(count, max(0, cap - state.load(home)))
        if keep_small and count - kept < least:
            kept = count
        rows += state.spread(expert, home, kept, count, cap, least)
    rows.sort(key=lambda row: (row[0], row[2]))
    return Spill(torch.tensor(rows, dtype=torch.int64), home_E, devices, cap, bound, False)


@dataclass(frozen=True)
class Replay:
    """Means over layers and steps: tokens of the busiest device over the mean of all, with experts at home and moved,
    and experts' weights that are sent in a step."""

    at_home: float
    moved: float
    sent: float


def replay(trace: Trace, home_LE: Tensor, devices: int, *, least: int = 1024) -> Replay:
    """What LLEP does to the steps of a trace; arguments as of `least_loaded`, with every cap at the mean."""
    found = []
    for rows in trace.steps():
        for tokens_E, home_E in zip(loads_LE(trace.select(rows)), home_LE, strict=True):
            spilled = least_loaded(tokens_E, home_E, devices, least=least)
            mean = max(float(tokens_E.sum()) / devices, 1e-9)
            native_D = torch.zeros(devices, dtype=torch.int64).scatter_add_(0, home_E, tokens_E)
            found.append([float(native_D.max()) / mean, float(spilled.loads_D.max()) / mean, len(spilled.moves_X2)])
    return Replay(*torch.tensor(found, dtype=torch.float64).mean(0).tolist())


@dataclass
class _State:
    """Of the devices: tokens of experts that were not looked at yet, assigned tokens, room for foreign experts."""

    pending: list[int]
    assigned: list[int]
    room: list[int]

    def load(self, device: int) -> int:
        return self.pending[device] + self.assigned[device]

    def spread(
        self, expert: int, home: int, kept: int, count: int, cap: int, least: int
    ) -> list[tuple[int, int, int, int]]:
        """Segments of one expert, of which its home keeps the first tokens."""
        rows = [(expert, home, 0, kept)] if kept else []
        self.assigned[home] += kept
        first, foreign = kept, set[int]()
        while first < count:
            rest = count - first
            others = [one for one in range(len(self.room)) if one != home and (self.room[one] or one in foreign)]
            others.sort(key=lambda one: (self.load(one), one))
            fitting = ((one, min(rest, cap - self.load(one))) for one in others)
            found = next(((one, n) for one, n in fitting if n > 0 and (n >= least or n == rest)), None)
            device, taken = found or ((others[0], rest) if others else (home, rest))
            if device != home and device not in foreign:
                self.room[device] -= 1
                foreign.add(device)
            self.assigned[device] += taken
            rows.append((expert, device, first, first + taken))
            first += taken
        return rows


def _require(
    tokens_E: Tensor, home_E: Tensor, devices: int, alpha: float, least: int, most_foreign: int | None
) -> None:
    if not alpha >= 1:
        raise CarpoolError(f"alpha={alpha}: devices cannot have less than their share each; give 1 or more")
    if least < 1 or (most_foreign is not None and most_foreign < 0):
        raise CarpoolError(f"least={least}, most_foreign={most_foreign}: give 1 or more tokens, 0 or more experts")
    if tokens_E.shape != home_E.shape or (len(home_E) and not 0 <= int(home_E.min()) <= int(home_E.max()) < devices):
        raise CarpoolError(
            f"{len(tokens_E)} experts with tokens, {len(home_E)} with a home on one of {devices} devices"
        )
    if (tokens_E < 0).any():
        raise CarpoolError("an expert has a negative number of tokens")
