"""Which resident expert leaves first: one rule, one class, for the simulator and for the runtime alike.

A rule ranks all experts after every layer of every step; of those that are in memory, the ones with the lowest rank
leave. What the layer itself needs stays as long as the layer does, whatever its rank.

Shapes: `L` MoE layers, `E` experts, `S` steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.offloading.accesses import Accesses

NEVER = -1


class History:
    """What was used so far. An event is one layer of one step, numbered from 0.

    Attributes:
        event: of the last one; step and layer of it.
        last_LE: event of an expert's last use, `NEVER` before the first. uses_LE: steps that used it.
        sequence_uses_LE, deep_uses_LE: since other requests began; the second where it was wanted at its deepest.
        sequence_steps: steps since then.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.event, self.step, self.layer, self.sequence_steps = -1, -1, -1, 0
        self.last_LE = torch.full((layers, experts), NEVER, device="cpu")
        self.uses_LE = torch.zeros_like(self.last_LE)
        self.sequence_uses_LE, self.deep_uses_LE = self.uses_LE.clone(), self.uses_LE.clone()

    @property
    def layers(self) -> int:
        return len(self.last_LE)

    def begin(self) -> None:
        """Other requests run from here on."""
        self.sequence_uses_LE.zero_()
        self.deep_uses_LE.zero_()
        self.sequence_steps = 0

    def observe(self, step: int, layer: int, needed_E: Tensor, deep_E: Tensor | None = None) -> None:
        """A layer uses these experts (bool `[E]`), some of them as deep as they are stored (default: all)."""
        self.sequence_steps += step != self.step
        self.step, self.layer, self.event = step, layer, step * self.layers + layer
        self.last_LE[layer][needed_E] = self.event
        self.uses_LE[layer] += needed_E
        self.sequence_uses_LE[layer] += needed_E
        self.deep_uses_LE[layer] += needed_E if deep_E is None else needed_E & deep_E

    def recent_LE(self) -> Tensor:
        """How late the last use was, 0 to below 1: what breaks ties."""
        return (self.last_LE + 1).double() / (self.event + 2)

    def ahead_L(self) -> Tensor:
        """Events until each layer comes next, 1 to `L`."""
        return (torch.arange(self.layers, device="cpu") - self.layer - 1) % self.layers + 1


class Rule(Protocol):
    """What stays."""

    def rank(self, history: History) -> Tensor:
        """float64 `[L, E]`; the lowest leave first."""
        ...


@dataclass(frozen=True)
class Lru:
    """Least recently used leaves."""

    def rank(self, history: History) -> Tensor:
        return history.last_LE.double()


@dataclass(frozen=True)
class Lfu:
    """Least often used leaves, of equals the least recently used."""

    def rank(self, history: History) -> Tensor:
        return history.uses_LE + history.recent_LE()


@dataclass(frozen=True)
class Lfru:
    """Least often used for its age leaves: uses over the events since the last one."""

    def rank(self, history: History) -> Tensor:
        return history.uses_LE / (history.event - history.last_LE + 1).double()


@dataclass(frozen=True)
class SequenceLfu:
    """Least often used in the present requests leaves (HOBBIT, arXiv 2411.01433, where it is a baseline)."""

    def rank(self, history: History) -> Tensor:
        return history.sequence_uses_LE + history.recent_LE()


@dataclass(frozen=True)
class LayerDistance:
    """Whose layer comes last leaves, of equals the least recently used: for a memory that all layers share."""

    def rank(self, history: History) -> Tensor:
        return history.recent_LE() - history.ahead_L().unsqueeze(-1)


@dataclass(frozen=True)
class Hobbit:
    """The four-part score of HOBBIT (arXiv 2411.01433): how lately, how often, how often deep, how soon its layer.

    `w_lru R/T + w_lfu F/T + w_lhu H/T' + w_fld (1 - d/L)`: `R` step of the last use, `F` uses, `T` steps; `H` uses at
    full depth and `T'` steps since the present requests began; `d` layers until the expert's own comes. The paper does
    not publish its weights; it fits them.
    """

    lru: float = 0.25
    lfu: float = 0.25
    lhu: float = 0.25
    fld: float = 0.25

    def rank(self, history: History) -> Tensor:
        steps, L = history.step + 1, history.layers
        last_LE = torch.where(history.last_LE == NEVER, 0, history.last_LE // L + 1)
        return (
            self.lru * last_LE.double() / steps
            + self.lfu * history.uses_LE.double() / steps
            + self.lhu * history.deep_uses_LE.double() / max(1, history.sequence_steps)
            + self.fld * (1 - (history.ahead_L() - 1).double() / L).unsqueeze(-1)
        )


@dataclass(frozen=True, eq=False)
class Pinned:
    """The most popular experts of another text stay, all others come and go (llama.cpp's and KTransformers' way).

    Attributes:
        popularity_LE: uses.
    """

    popularity_LE: Tensor

    @classmethod
    def fit(cls, accesses: Accesses) -> Pinned:
        return cls(accesses.needed_SLE.sum(0).double())

    def rank(self, history: History) -> Tensor:
        return self.popularity_LE + history.recent_LE() / 2


@dataclass(frozen=True, eq=False)
class Matched:
    """Experts that a similar request used stay (MoE-Infinity, arXiv 2401.14361).

    The present requests' counts are compared with those of known requests, layer by layer by their cosine; the nearest
    one foretells. Rank: foretold share of the layer's uses, times how soon the layer comes, times own uses. Compared
    are the layers with uses so far: the released code overwrites them before it compares, which makes all known
    requests equally near.

    Attributes:
        known_XLE: uses of each known request, float64.
    """

    known_XLE: Tensor
    _unit_XLE: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_unit_XLE", torch.nn.functional.normalize(self.known_XLE.double(), dim=-1))

    @classmethod
    def fit(cls, accesses: Accesses) -> Matched:
        starts = [*accesses.begins_S.nonzero().flatten().tolist(), len(accesses)]
        if starts[0] != 0:
            starts.insert(0, 0)
        return cls(torch.stack([accesses.needed_SLE[one:end].sum(0).double() for one, end in pairwise(starts)]))

    def nearest(self, history: History) -> int:
        """Which known request is most like the present ones."""
        mine_LE = torch.nn.functional.normalize(history.sequence_uses_LE.double(), dim=-1)
        return int((self._unit_XLE * mine_LE).sum((1, 2)).argmax())

    def rank(self, history: History) -> Tensor:
        known_LE = self.known_XLE[self.nearest(history)]
        share_LE = known_LE / known_LE.sum(-1, keepdim=True).clamp_min(1)
        soon_L1 = (1 - (history.ahead_L() - 1).double() / (history.layers + 1)).unsqueeze(-1)
        own_LE = history.sequence_uses_LE / history.sequence_uses_LE.sum(-1, keepdim=True).clamp_min(1).double()
        return (share_LE + SMALL) * soon_L1 * (own_LE + SMALL) + SMALL**3 * history.recent_LE()


SMALL = 1e-6  # MoE-Infinity's


@dataclass(frozen=True, eq=False)
class Belady:
    """What is needed latest leaves: it knows the future, and no rule loads less where all experts are one size.

    Attributes:
        next_SLE: the step at or after `s` that needs an expert next, `S` if none.
    """

    next_SLE: Tensor

    @classmethod
    def fit(cls, accesses: Accesses) -> Belady:
        """Of the very steps that it will be asked about."""
        S = len(accesses)
        step_S11 = torch.arange(S).reshape(-1, 1, 1)
        when_SLE = torch.where(accesses.needed_SLE, step_S11, S)
        when_SLE = torch.cat([when_SLE, torch.full_like(when_SLE[:1], S)])
        return cls(when_SLE.flip(0).cummin(0).values.flip(0))

    def rank(self, history: History) -> Tensor:
        step, L = history.step, history.layers
        layer_L1 = torch.arange(L).unsqueeze(-1)
        next_LE = torch.where(layer_L1 <= history.layer, self.next_SLE[step + 1], self.next_SLE[step])
        return -(next_LE * L + layer_L1).double()


RULES: dict[str, type[Rule]] = {
    "lru": Lru, "lfu": Lfu, "lfru": Lfru, "sequence_lfu": SequenceLfu, "layer_distance": LayerDistance,
    "hobbit": Hobbit,
}  # fmt: skip
FITTED: dict[str, type[Pinned] | type[Matched]] = {"pinned": Pinned, "matched": Matched}


def rule_of(name: str, known: Accesses | None = None) -> Rule:
    """A rule by its name.

    Args:
        known: what other requests used, for rules that are fitted.

    Raises:
        CarpoolError: an unknown name, or a rule that is fitted and nothing to fit it to.
    """
    if name in RULES:
        return RULES[name]()
    if name in FITTED:
        if known is None:
            raise CarpoolError(f"the cache rule {name} is fitted to what other requests used: give a trace of them")
        return FITTED[name].fit(known)
    raise CarpoolError(f"unknown cache rule {name!r}; use one of {', '.join(rule_names())}")


def rule_names() -> Sequence[str]:
    """All that `rule_of` knows."""
    return (*RULES, *FITTED)
