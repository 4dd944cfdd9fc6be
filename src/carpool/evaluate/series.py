"""Methods as curves: the settings of one method over a range of bytes read, and how two curves compare."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from carpool.evaluate.intervals import Array, ratio, ratio_draws
from carpool.evaluate.metrics import Result
from carpool.plans.grammar import Plan, parse

LEAST_KL = 1e-9  # nats; below what float32 resolves, keeps log KL finite


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
    """Results of one series, from the fewest bytes read to the most, with bootstrap draws of both axes.

    Attributes:
        series: the method.
        results: one a setting.
        stock: stock on the same batches.
        counts_RM: the draws.
    """

    series: Series
    results: tuple[Result, ...]
    stock: Result
    counts_RM: Array

    @classmethod
    def of(cls, series: Series, results: Sequence[Result], counts_RM: Array) -> Curve:
        """The curve of a series among the results of one batch size (stock first)."""
        own = [result for result in results if result.measured.plan in series.plans]
        return cls(series, tuple(sorted(own, key=lambda r: r.bytes.value)), results[0], counts_RM)

    @cached_property
    def share_I(self) -> Array:
        """Bytes read over stock's, by setting; a surrogate counts at its size."""
        return np.array([ratio(*self._share(result)) for result in self.results])

    @cached_property
    def share_RI(self) -> Array:
        """The same in every draw."""
        return np.stack([ratio_draws(*self._share(result), self.counts_RM) for result in self.results], axis=1)

    @cached_property
    def log_kl_I(self) -> Array:
        """Logarithm of the KL, by setting."""
        return np.log([max(ratio(*_kl(result)), LEAST_KL) for result in self.results])

    @cached_property
    def log_kl_RI(self) -> Array:
        """The same in every draw."""
        draws = [ratio_draws(*_kl(result), self.counts_RM) for result in self.results]
        return np.log(np.maximum(np.stack(draws, axis=1), LEAST_KL))

    def holds(self, share: float) -> bool:
        """Whether the settings span this share, so that interpolation is fair."""
        return bool(self.share_I[0] <= share <= self.share_I[-1])

    def log_kl_at(self, share: float) -> float:
        """Logarithm of the KL at a share, linear in the share between settings."""
        return float(np.interp(share, self.share_I, self.log_kl_I))

    def log_ratio_at(self, share: float) -> float:
        """Logarithm of the perplexity ratio at a share, linear between settings."""
        return float(np.interp(share, self.share_I, [np.log(r.perplexity_ratio.value) for r in self.results]))

    def _share(self, result: Result) -> tuple[Array, Array]:
        return result.measured.layers["bytes"].sum(1), self.stock.measured.layers["union"].sum(1)


def _kl(result: Result) -> tuple[Array, Array]:
    return result.measured.kl_M, result.measured.tokens_M


def worse_draws(method: Curve, setting: int, control: Curve) -> Array:
    """In every draw, log KL of a method's setting minus the control's at equal bytes; positive is worse."""
    return np.array(
        [
            own_kl - np.interp(own_share, shares, kls)
            for own_kl, own_share, shares, kls in zip(
                method.log_kl_RI[:, setting], method.share_RI[:, setting], control.share_RI, control.log_kl_RI,
                strict=True,
            )
        ]
    )  # fmt: skip
