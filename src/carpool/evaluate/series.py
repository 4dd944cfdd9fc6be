"""Methods as curves: the settings of one method over a range of bytes read, and how two curves compare."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from carpool.evaluate.equal_bytes import Points
from carpool.evaluate.intervals import Array
from carpool.evaluate.metrics import Result
from carpool.plans.grammar import Plan, parse


@dataclass(frozen=True)
class Series:
    """A method and the settings it is shown at.

    Attributes:
        label: for people. plans: its settings. control: what every method has to beat.
    """

    label: str
    plans: tuple[Plan, ...]
    control: bool = False


def load_demo() -> tuple[dict[str, Any], list[Series]]:
    """The settings and series of `demo.toml`."""
    content = tomllib.loads(files("carpool.evaluate").joinpath("demo.toml").read_text(encoding="utf-8"))
    series = [
        Series(entry["label"], tuple(parse(text) for text in entry["policies"]), entry.get("control", False))
        for entry in content.pop("series")
    ]
    return content, series


@dataclass(frozen=True, eq=False)
class Curve:
    """Results of one series, from the fewest bytes read to the most.

    Attributes:
        series: the method.
        results: one a setting.
        stock: stock on the same batches.
        points: the same settings in every sample of the batches.
    """

    series: Series
    results: tuple[Result, ...]
    stock: Result
    points: Points

    @classmethod
    def of(cls, series: Series, results: Sequence[Result]) -> Curve:
        """The curve of a series among the results of one batch size (stock first)."""
        own = sorted((r for r in results if r.measured.plan in series.plans), key=lambda r: r.bytes.value)
        sums = [(r.measured.layers["bytes"].sum(1), r.measured.kl_M, r.measured.tokens_M) for r in own]
        return cls(series, tuple(own), results[0], Points.of(sums, results[0].measured.layers["bytes"].sum(1)))

    @property
    def share_I(self) -> Array:
        """Bytes read over stock's, by setting."""
        return self.points.share_KI[0]

    @property
    def log_kl_I(self) -> Array:
        """Logarithm of the KL, by setting."""
        return self.points.log_kl_KI[0]

    def log_kl_at(self, share: float) -> float:
        """Logarithm of the KL at a share."""
        return float(self.points.at(share)[0])

    def log_ratio_at(self, share: float) -> float:
        """Logarithm of the perplexity ratio at a share, linear between settings."""
        return float(np.interp(share, self.share_I, [np.log(r.perplexity_ratio.value) for r in self.results]))


def worse(method: Curve, setting: int, control: Curve) -> Array:
    """In every sample, log KL of a method's setting minus the control's at equal bytes, `[K]`; positive is worse."""
    return method.points.log_kl_KI[:, setting] - control.points.at(method.points.share_KI[:, setting])
