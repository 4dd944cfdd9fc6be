"""How sure a model is, as numbers in [0, 1]: of a distribution over classes or tokens, and of an answer's tokens.

Every signal is 0 where a model knows nothing (the uniform distribution, a tie of the best two) and 1 where it has no
doubt. Shapes: `N` items, `V` classes or tokens, `T` tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from carpool.errors import CarpoolError


def variance(p_NV: Tensor) -> Tensor:
    """Mowst's dispersion (arXiv 2311.05185): the variance of the probabilities over that of a one-hot one, `[N]`."""
    count = _classes(p_NV)
    return ((p_NV.double() - 1 / count).square().sum(-1) / (1 - 1 / count)).clamp(0, 1)


def negentropy(p_NV: Tensor) -> Tensor:
    """Mowst's second dispersion: 1 less the entropy over that of the uniform distribution, `[N]`."""
    count = _classes(p_NV)
    p_NV = p_NV.double()
    entropy_N = -torch.where(p_NV > 0, p_NV * p_NV.clamp_min(1e-300).log(), 0.0).sum(-1)
    return (1 - entropy_N / torch.tensor(count, dtype=torch.float64).log()).clamp(0, 1)


def margin(p_NV: Tensor) -> Tensor:
    """The best probability less the second, `[N]`."""
    _classes(p_NV)
    best_N2 = p_NV.double().topk(2, dim=-1).values
    return best_N2[..., 0] - best_N2[..., 1]


def peak(p_NV: Tensor) -> Tensor:
    """The best probability, from 0 at the uniform distribution, `[N]`."""
    count = _classes(p_NV)
    return ((p_NV.double().amax(-1) - 1 / count) / (1 - 1 / count)).clamp(0, 1)


SIGNALS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "variance": variance, "negentropy": negentropy, "margin": margin, "peak": peak,
}  # fmt: skip


def answer_mean(logprobs_NT: Tensor, span_NT: Tensor) -> Tensor:
    """The geometric mean of the probabilities of an answer's tokens, `[N]`; 0 for an empty span.

    A mean, since a sum would shrink with the answer's length and measure that.

    Args:
        logprobs_NT: of the tokens that were written. span_NT: which of them are the answer, bool.
    """
    count_N = span_NT.sum(-1)
    mean_N = (logprobs_NT.double() * span_NT).sum(-1) / count_N.clamp_min(1)
    return torch.where(count_N > 0, mean_N.clamp_max(0).exp(), 0.0)


def answer_least(logprobs_NT: Tensor, span_NT: Tensor) -> Tensor:
    """The least probability of an answer's tokens, `[N]`; 0 for an empty span."""
    least_N = logprobs_NT.double().masked_fill(~span_NT, 0.0).clamp_max(0).amin(-1)
    return torch.where(span_NT.any(-1), least_N.exp(), 0.0)


def _classes(p_NV: Tensor) -> int:
    """Raises CarpoolError unless the rows can be distributions over two classes or more."""
    count = p_NV.shape[-1]
    if count < 2:
        raise CarpoolError(f"a confidence over {count} classes; a distribution has two or more")
    if not bool(((p_NV >= 0) & p_NV.isfinite()).all()) or bool(((p_NV.double().sum(-1) - 1).abs() > 1e-3).any()):
        raise CarpoolError("a confidence of rows that are no probabilities (finite, 0 or more, sum 1); give a softmax")
    return count
