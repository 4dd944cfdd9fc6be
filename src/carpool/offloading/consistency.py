"""How local routing is: SRP and SCH (arXiv 2505.16056), from who chose whom, before anything is cached.

Shapes: `T` tokens of one request, `L` MoE layers, `K` experts a token, `E` experts, `R` requests, `F` how often an
expert was activated in a window of `m` tokens, 0 to `m`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.offloading.bootstrap import draws, ends, ratio

WINDOWS = (4, 16, 64, 256)  # the paper's


def chosen(experts_TLK: Tensor, num_experts: int) -> Tensor:
    """Who was chosen, bool `[T, L, E]`; ids below 0 are nobody."""
    held_TLE = torch.zeros(*experts_TLK.shape[:-1], num_experts + 1, dtype=torch.bool)
    ids_TLK = torch.where(experts_TLK < 0, num_experts, experts_TLK.long())
    return held_TLE.scatter_(-1, ids_TLK, True)[..., :num_experts]


def activations(chosen_TLE: Tensor, window: int) -> Tensor:
    """In how many windows of a request an expert was activated `f` times, int64 `[L, E, F]`.

    All windows of consecutive tokens count, `T - m + 1` of them; a shorter request has none.
    """
    T, L, E = chosen_TLE.shape
    if window > T:
        return torch.zeros(L, E, window + 1, dtype=torch.int64)
    sums_TLE = torch.cat([torch.zeros(1, L, E, dtype=torch.int64), chosen_TLE.long().cumsum(0)])
    often_PLE = sums_TLE[window:] - sums_TLE[:-window]
    place_LE = torch.arange(L * E).reshape(L, E) * (window + 1)
    return torch.bincount((often_PLE + place_LE).flatten(), minlength=L * E * (window + 1)).reshape(L, E, window + 1)


@dataclass(frozen=True, eq=False)
class Best:
    """The best segment router of every leading index.

    Attributes:
        srp_X: F1 of "activated in this window" against the activations, 0 to 1.
        threshold_X: activations in a window from which the router is on.
        size_X: tokens for which it is on over activations (the paper's rho).
    """

    srp_X: Tensor
    threshold_X: Tensor
    size_X: Tensor


def srp(windows_XF: Tensor) -> Best:
    """Segment routing best performance (equations 4 and 6).

    `max_a 2 sum_{f >= a} f / sum [m 1(f >= a) + f]`, sums over windows; where the leading index stands for several
    experts, they share the threshold `a`.

    Args:
        windows_XF: windows by their activations (`activations`, summed over what belongs together).
    """
    windows_XF = windows_XF.double()
    window = windows_XF.shape[-1] - 1
    often_F = torch.arange(window + 1, dtype=torch.float64)
    total_X1 = (windows_XF * often_F).sum(-1, keepdim=True)
    found_XF = (windows_XF * often_F).flip(-1).cumsum(-1).flip(-1)[..., 1:]  # by threshold, 1 to m
    on_XF = window * windows_XF.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    f1_XF = 2 * found_XF / (on_XF + total_X1).clamp_min(1)
    best = f1_XF.max(-1)
    size_XF = on_XF / total_X1.clamp_min(1)
    return Best(best.values, best.indices + 1, size_XF.gather(-1, best.indices.unsqueeze(-1)).squeeze(-1))


@dataclass(frozen=True)
class Measured:
    """A measure with its interval over requests.

    Attributes:
        value: of all requests together. low, high: 95 % of the bootstrap's draws.
        layers: the same, layer by layer.
        size: see `Best`; of a cache, its capacity over `K`.
        requests: how many were long enough.
    """

    value: float
    low: float
    high: float
    layers: tuple[float, ...]
    size: float
    requests: int


def consistency(requests: Sequence[Tensor], num_experts: int, window: int, seed: int = 0) -> Measured:
    """SRP of a model, one threshold for all experts of all layers, with its bootstrap over requests.

    Args:
        requests: the experts of each one's tokens, `[T, L, K]`, decoded or read one after another.
        window: `m`, tokens.

    Raises:
        CarpoolError: no request is that long.
    """
    windows_RLF = torch.stack([activations(chosen(one, num_experts), window).sum(1) for one in requests])
    enough_R = windows_RLF.sum((1, 2)) > 0
    if not bool(enough_R.any()):
        longest = max((len(one) for one in requests), default=0)
        raise CarpoolError(f"no request has {window} tokens (the longest has {longest}); use a shorter window")
    windows_RLF = windows_RLF[enough_R]
    whole = srp(windows_RLF.sum((0, 1)))
    drawn_BF = draws(len(windows_RLF), seed) @ windows_RLF.sum(1).double()
    low, high = ends(srp(drawn_BF).srp_X)
    layers = tuple(srp(windows_RLF.sum(0)).srp_X.tolist())
    return Measured(float(whole.srp_X), low, high, layers, float(whole.size_X), len(windows_RLF))


def segment_cache(requests: Sequence[Tensor], num_experts: int, window: int, size: float, seed: int = 0) -> Measured:
    """SCH: hit rate of a cache that knows the next `m` tokens.

    Every layer holds `size * K` experts (the paper's rho). A token's missing experts are loaded; the ones that the next
    `m` tokens activate least often leave, among equals the one that was used longest ago. Caches are empty where a
    request begins, and every first use is a miss (the published code books first uses otherwise).

    Raises:
        CarpoolError: a cache that does not hold one token's experts.
    """
    hits_RL, uses_RL = segment_hits(requests, num_experts, window, size)
    value, low, high = ratio(hits_RL.sum(1), uses_RL.sum(1), seed)
    layers = tuple((hits_RL.sum(0) / uses_RL.sum(0).clamp_min(1)).tolist())
    return Measured(value, low, high, layers, size, len(requests))


def segment_hits(requests: Sequence[Tensor], num_experts: int, window: int, size: float) -> tuple[Tensor, Tensor]:
    """Hits and uses of `segment_cache`, float64 `[R, L]`."""
    most = max(int((one >= 0).sum(-1).max()) for one in requests)
    capacity = int(size * requests[0].shape[-1])
    if capacity < most:
        raise CarpoolError(f"a cache of {capacity} experts does not hold one token's {most}; give a size of 1 or more")
    lengths_R = torch.tensor([len(one) for one in requests])
    longest = int(lengths_R.max())
    chosen_TRLE = torch.stack(
        [
            torch.nn.functional.pad(chosen(one, num_experts), (0, 0, 0, 0, 0, longest + window - len(one)))
            for one in requests
        ],
        1,
    )
    counts_TRLE = torch.cat([chosen_TRLE.new_zeros(1, *chosen_TRLE.shape[1:]).int(), chosen_TRLE.int().cumsum(0)])
    last_RLE = torch.full(chosen_TRLE.shape[1:], -1)
    resident_RLE = torch.zeros_like(last_RLE, dtype=torch.bool)
    hits_RL = torch.zeros(last_RLE.shape[:2], dtype=torch.float64)
    uses_RL = torch.zeros_like(hits_RL)
    for token in range(longest):
        now_RLE = chosen_TRLE[token]
        hits_RL += (now_RLE & resident_RLE).sum(-1)
        uses_RL += now_RLE.sum(-1)
        last_RLE = torch.where(now_RLE, token, last_RLE)
        soon_RLE = counts_TRLE[token + 1 + window] - counts_TRLE[token + 1] if token + window < len(chosen_TRLE) else 0
        rank_RLE = (soon_RLE * (longest + 1) + last_RLE + 1).masked_fill(now_RLE, 1 << 60)
        held_RLE = resident_RLE | now_RLE
        kept = torch.where(held_RLE, rank_RLE, -1).topk(min(capacity, num_experts), -1)
        resident_RLE = torch.zeros_like(held_RLE).scatter_(-1, kept.indices, kept.values >= 0)
    return hits_RL, uses_RL
