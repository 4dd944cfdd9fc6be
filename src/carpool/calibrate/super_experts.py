"""Super experts: the few whose rare, extreme outputs make a model's massive activations (arXiv 2507.23279).

`E` experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SHARE = 0.995  # of all experts' peaks lie below a super expert's
PART = 0.1  # of the largest peak, which a super expert's exceeds
MASSIVE = 1000.0  # times the median of a hidden state (Sun et al., arXiv 2402.17762)
RISE = 2.0  # of the largest number in a layer that makes massive activations


def stream_peaks(before_NH: Tensor | None, added_NH: Tensor) -> Tensor:
    """Largest over median magnitude of the residual stream before and after the experts' sum is added, float32 `[2]`;
    zeros where the stream is not known."""
    if before_NH is None:
        return torch.zeros(2)
    streams = before_NH.float().abs(), (before_NH.float() + added_NH.float()).abs()
    median = torch.stack([one.median() for one in streams]).clamp_min(1e-30)
    return (torch.stack([one.amax() for one in streams]) / median).cpu()


def super_experts(peaks: Mapping[int, Tensor], streams: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Which experts are super experts, bool `[E]` by layer index.

    An expert is one if the largest number that it puts out on its own tokens is above 99.5 % of all experts' and above
    a tenth of the largest, and its layer makes massive activations.

    Reading of the paper: a layer makes massive activations if the largest number of the residual stream behind it is
    1000 times its median, and twice as far from it as before the layer.

    Args:
        peaks: largest magnitude of each expert's output, `[E]`. streams: see `stream_peaks`.
    """
    every = torch.cat([peak_E.double() for peak_E in peaks.values()])
    least = max(float(torch.quantile(every, SHARE)), PART * float(every.amax()))
    found = {}
    for index, peak_E in peaks.items():
        before, after = streams[index].tolist()
        found[index] = (peak_E.double() > least) & (after >= MASSIVE and after >= RISE * before)
    return found
