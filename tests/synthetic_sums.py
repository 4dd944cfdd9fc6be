"""Sums of an evaluation whose metrics are known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np

from carpool.evaluate.intervals import Array
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS
from carpool.evaluate.measured import Measured
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping

BATCHES, LAYERS, TOKENS = 12, 2, 24
LAYOUT = Layout(4, 9, 3, Grouping.parse("batch"))  # 6 steps of 4 tokens
READ = 8.0  # experts that stock reads in a layer and step


def scatter(seed: int, size: float) -> Array:
    """Factors around 1, one a batch; their mean is 1."""
    wave_M = np.sin(np.arange(BATCHES) * (seed + 1) + seed)
    return 1 + size * (wave_M - wave_M.mean())


def measured(
    policy: str | None = None, share: float = 1.0, kl: float = 0.0, log_ratio: float = 0.0, *, spread: float = 0.1,
    **fields: Any,
) -> Measured:  # fmt: skip
    """A plan that reads `share` of stock's bytes in every batch, at this KL on average.

    Args:
        log_ratio: logarithm of its perplexity over stock's. spread: of the KL between batches.
        fields: of the layers, experts or pairs a layer and step.
    """
    size_M = 1 + np.arange(BATCHES)[:, None] / 10  # batches differ in what they read
    steps = LAYOUT.steps
    layers = {name: np.zeros((BATCHES, LAYERS)) for name in LAYER_FIELDS}
    for name, value in ({"union": share * READ, "bytes": share * READ, "natural_union": READ} | fields).items():
        layers[name] = value * steps * size_M * np.array([0.5, 1.5]) / size_M.mean()
    ones_M = np.ones(BATCHES)
    return Measured(
        plan=None if policy is None else parse(policy), layout=LAYOUT, domains=("all",), layers=layers,
        kl_M=kl * TOKENS * scatter(sum(map(ord, policy or "")), spread), agree_M=0.75 * TOKENS * ones_M,
        nll_MD=((2 + log_ratio) * TOKENS * ones_M)[:, None], tokens_MD=TOKENS * ones_M[:, None],
    )  # fmt: skip
