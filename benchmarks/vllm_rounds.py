"""States of one running engine, timed in turn: stock, policies, and beside each policy its ideals.

A round times a block of steps of each state. Ratios are of blocks of the same round, so that a machine that slows down
between rounds changes none of them.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm_states import Engine, Ids, random_ids, union

from carpool.evaluate.intervals import LEVEL, Estimate

SEED = 0


class State:
    """One way to route.

    Args:
        name: in the results.
        switch: makes the engine route so, between two steps.
        union: mean number of distinct experts of a layer and step.
    """

    def __init__(self, name: str, switch: Callable[[], None], union: float) -> None:
        self.name, self.switch, self.union = name, switch, union
        self.seconds: list[float] = []  # of each block

    @property
    def group(self) -> str:
        """States of one group are timed side by side."""
        return self.name

    @contextlib.contextmanager
    def ready(self, engine: Engine) -> Iterator[None]:
        """The engine routes so; around the timed steps."""
        self.switch()
        yield

    def time(self, engine: Engine, steps: int) -> None:
        with self.ready(engine):
            begin = time.perf_counter()
            for _ in range(steps):
                engine.step()
            self.seconds.append(time.perf_counter() - begin)

    def per_step(self) -> dict[str, float | None]:
        """Means of a layer and step."""
        return {"union": self.union, "natural_union": None, "surrogates": None}


class Policy(State):
    """Sharing by a policy; remembers what it chose in its last block.

    Args:
        engine: that it runs in.
        text: of the policy.
        ids: what it chose in some steps before the first block.
    """

    def __init__(self, engine: Engine, text: str, ids: Ids) -> None:
        super().__init__(text, lambda: engine.policy(text), union(ids))
        self.ids = ids[-1:]
        self.counted: list[dict[str, float]] = []

    @property
    def group(self) -> str:
        return backfill_of(self.name)

    @contextlib.contextmanager
    def ready(self, engine: Engine) -> Iterator[None]:
        self.switch()
        engine.report()  # start from nothing
        ids: Ids = []
        with engine.recording(ids):
            yield
        self.counted.append(engine.report())
        self.ids = ids

    def per_step(self) -> dict[str, float | None]:
        steps = sum(counts["steps"] for counts in self.counted)
        if not steps:
            return super().per_step()
        return {name: sum(counts[name] for counts in self.counted) / steps for name in super().per_step()}


class Ideal(State):
    """Stock with ids that were made before: `replayed`, those of the policy's block before, or `ideal`, random sets of
    as many experts.

    Args:
        kind: `ideal` or `replayed`.
        of: the policy.
        experts: of a layer.
    """

    def __init__(self, kind: str, of: Policy, experts: int) -> None:
        super().__init__(f"{kind}: {of.name}", lambda: None, of.union)
        self.kind, self.of, self.experts = kind, of, experts
        self.unions: list[float] = []

    @property
    def group(self) -> str:
        return self.of.group

    @contextlib.contextmanager
    def ready(self, engine: Engine) -> Iterator[None]:
        ids = self.of.ids
        if self.kind == "ideal":
            ids = random_ids(*ids[0][0].shape, self.experts, ids, seed=len(self.seconds))
        self.unions.append(union(ids))
        engine.forced(ids)
        yield

    def per_step(self) -> dict[str, float | None]:
        return super().per_step() | {"union": float(np.mean(self.unions)) if self.unions else self.union}


def interleave(engine: Engine, states: Sequence[State], rounds: int, steps: int) -> None:
    """Time all states `rounds` times, groups and the states of a group in random order."""
    shuffle = random.Random(SEED)
    groups: dict[str, list[State]] = {}
    for state in states:
        groups.setdefault(state.group, []).append(state)
    for _ in range(rounds):
        for group in _shuffled(groups.values(), shuffle):
            for state in _shuffled(group, shuffle):
                state.time(engine, steps)


def _shuffled(items: Collection[Any], shuffle: random.Random) -> list[Any]:
    return shuffle.sample(list(items), len(items))


def paired(numerator_M: NDArray[np.float64], denominator_M: NDArray[np.float64]) -> Estimate:
    """The median over rounds of a ratio, with its interval: the two order statistics between which the median lies with
    95 % or more, whatever the distribution (none below six rounds)."""
    ratio_M = np.sort(numerator_M / denominator_M)
    rounds, outside, below = len(ratio_M), 0.0, 0
    while below < rounds and 2 * (outside + math.comb(rounds, below) / 2**rounds) <= 1 - LEVEL:
        outside += math.comb(rounds, below) / 2**rounds
        below += 1
    ends = (float(ratio_M[below - 1]), float(ratio_M[rounds - below])) if below else (None, None)
    return Estimate(float(np.median(ratio_M)), *ends)


def summarise(states: Sequence[State], tokens: int, steps: int, bandwidth: float, bytes_per_expert: int,
              bytes_per_surrogate: int = 0) -> dict[str, Any]:  # fmt: skip
    """Throughput, unions, and ratios of time with intervals, by state.

    Args:
        states: with their times.
        tokens, steps: of a block.
        bandwidth: GB/s at which memory is read.
        bytes_per_expert, bytes_per_surrogate: of all layers.
    """
    seconds = {state.name: np.array(state.seconds) for state in states}
    result: dict[str, Any] = {}
    for state in states:
        name, per_step = state.name, state.per_step()
        read = (per_step["union"] or 0) * bytes_per_expert + (per_step["surrogates"] or 0) * bytes_per_surrogate
        block = float(np.median(seconds[name]))
        row = {
            "tokens_per_second": tokens / block,
            "ms_per_step": 1000 * block / steps,
            **per_step,
            "expert_gb_per_step": read / 1e9,
            "share_of_read_bandwidth": read / 1e9 * steps / block / bandwidth,
            "seconds_per_block": [round(value, 6) for value in state.seconds],
        }
        for against in ("stock", f"ideal: {name}", f"replayed: {name}"):
            if against in seconds and against != name:
                row[f"throughput_over_{against.split(':')[0]}"] = asdict(paired(seconds[against], seconds[name]))
        backfill = backfill_of(name)
        if isinstance(state, Policy) and backfill != name and backfill in seconds:
            row["throughput_over_backfill"] = asdict(paired(seconds[backfill], seconds[name]))
        result[name] = row
    return result


def backfill_of(name: str) -> str:
    """The policy that reads as many experts without surrogates; other policies themselves."""
    return name.replace("surrogate(", "xshare(", 1)
