"""How far two predictions of the next token are apart: KL divergence, a few rows at a time.

Shapes: `R` rows, `V` vocabulary, `C` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 19  # logits that are compared at a time; 2 MiB in float32 stay in a cache


def log_probabilities(*logits_RV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Log-probabilities in float32 of the same rows under several models, chunk by chunk, `[C, V]` each."""
    rows = max(1, CHUNK // logits_RV[0].shape[-1])
    for chunks in zip(*(one.split(rows) for one in logits_RV), strict=True):
        yield tuple(one_CV.float().log_softmax(-1) for one_CV in chunks)


def divergence(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """KL(p || q) in nats of every row, `[C]`; never below 0, as rounding could have it."""
    return torch.linalg.vecdot(log_p_CV.exp(), log_p_CV - log_q_CV).clamp_min(0.0)
