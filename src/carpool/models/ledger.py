"""What answering cost: loads, bytes, tokens and seconds of every model, and what another order would have cost."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from carpool.models.pool import Expert


@dataclass
class Account:
    """One model's.

    Attributes:
        loads: times its weights were read from disk; 0 for a server, whose weights are there. bytes: read for that.
        questions: that it was asked in this run. read, written: tokens.
        load_seconds, answer_seconds: wall clock.
    """

    loads: int = 0
    bytes: int = 0
    questions: int = 0
    read: int = 0
    written: int = 0
    load_seconds: float = 0.0
    answer_seconds: float = 0.0


@dataclass
class Ledger:
    """Accounts by model, in the order of their loads. Experts that are one model share one."""

    accounts: dict[tuple[str, ...], Account] = field(default_factory=dict)

    def of(self, expert: Expert) -> Account:
        return self.accounts.setdefault(expert.weights, Account())

    @property
    def loads(self) -> int:
        return sum(one.loads for one in self.accounts.values())

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.accounts.values())

    def to_dict(self) -> dict[str, Any]:
        """Sums, and the accounts by model."""
        accounts = {":".join(filter(None, weights)): asdict(one) for weights, one in self.accounts.items()}
        total = {name: sum(one[name] for one in accounts.values()) for name in asdict(Account())}
        return {"total": total, "models": accounts}


@dataclass(frozen=True)
class Loads:
    """Loads and bytes of an order of asking, counted without asking."""

    loads: int
    bytes: int


def loads_one_by_one(asked: Sequence[Sequence[Expert]], resident: int = 1) -> Loads:
    """What answering question by question costs: each one's experts in turn, the last `resident` models kept.

    Args:
        asked: the experts of each question.
        resident: models that fit into memory together; the one that was used longest ago makes room.
    """
    kept: OrderedDict[tuple[str, ...], None] = OrderedDict()
    loads = size = 0
    for experts in asked:
        for expert in experts:
            if expert.engine == "server":
                continue
            if expert.weights not in kept:
                loads, size = loads + 1, size + expert.bytes
                if len(kept) >= resident:
                    kept.popitem(last=False)
            kept[expert.weights] = None
            kept.move_to_end(expert.weights)
    return Loads(loads, size)


def loads_grouped(asked: Sequence[Sequence[Expert]]) -> Loads:
    """What answering model by model costs: one load each."""
    distinct = {expert.weights: expert for experts in asked for expert in experts if expert.engine != "server"}
    return Loads(len(distinct), sum(expert.bytes for expert in distinct.values()))
