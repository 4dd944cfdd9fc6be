"""Methods at equal bytes: log KL over the bytes read, linear between a method's settings.

Shapes: `M` batches, `I` settings of a method, `K = 1 + M` samples as in `carpool.evaluate.intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carpool.evaluate.intervals import Array, log_kl, ratios


@dataclass(frozen=True, eq=False)
class Points:
    """Settings of one method, from the fewest bytes to the most.

    Attributes:
        share_KI: bytes read over stock's; a surrogate counts at its size.
        log_kl_KI: logarithm of the KL in nats a token.
    """

    share_KI: Array
    log_kl_KI: Array

    @classmethod
    def of(cls, settings: Sequence[tuple[Array, Array, Array]], stock_bytes_M: Array) -> Points:
        """From sums by batch of every setting: bytes, KL and tokens, `[M]` each; in any order."""
        found = sorted(
            ((ratios(read_M, stock_bytes_M), log_kl(kl_M, tokens_M)) for read_M, kl_M, tokens_M in settings),
            key=lambda point: point[0][0],
        )
        shares, kls = zip(*found, strict=True)
        return cls(np.stack(shares, axis=1), np.stack(kls, axis=1))

    def holds(self, share: float, hair: float = 0.0) -> bool:
        """Whether the settings span this share, so that interpolation is fair; `hair` is what they may miss it by."""
        return bool(self.share_KI[0, 0] - hair <= share <= self.share_KI[0, -1] + hair)

    def at(self, share: float | Array) -> Array:
        """Log KL at a share, `[K]`; beyond the settings it is that of the last one.

        Args:
            share: the same for all samples, or `[K]`.
        """
        return interpolated(share, self.share_KI, self.log_kl_KI)


def interpolated(x: float | Array, x_KI: Array, y_KI: Array) -> Array:
    """In every row the value at `x` of the line through the row's points, constant beyond the first and the last."""
    if x_KI.shape[1] == 1:
        return y_KI[:, 0]
    x_K1 = np.broadcast_to(x, len(x_KI))[:, None]
    right_K1 = (x_KI < x_K1).sum(1, keepdims=True).clip(1, x_KI.shape[1] - 1)
    (x0, x1), (y0, y1) = (
        (np.take_along_axis(values, right_K1 - 1, 1)[:, 0], np.take_along_axis(values, right_K1, 1)[:, 0])
        for values in (x_KI, y_KI)
    )
    return y0 + (y1 - y0) * ((x_K1[:, 0] - x0) / np.maximum(x1 - x0, 1e-12)).clip(0, 1)
