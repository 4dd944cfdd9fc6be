"""From sums a batch to metrics with intervals. Every metric is a ratio of sums, or e to the power of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from carpool.evaluate.intervals import Array, Estimate, estimate, ratio
from carpool.evaluate.measured import Measured


@dataclass(frozen=True)
class Result:
    """The metrics of one plan at one batch size; what has an interval is an `Estimate`.

    Attributes:
        coreset: mean coreset size of a group, layers averaged; None for token-local policies and stock.
        union: mean number of distinct experts read in a layer and step. union_share: the same over stock's.
        natural_union: what the rows of this run would have read under native routing.
        pairs: (row, expert) pairs computed for a row in a layer.
        displaced_mass: share of a row's native weight that is not computed, mean over rows and layers.
        expected_loss: the same, with pairs left to surrogates at what calibration expects to be lost.
        overflow: experts a step reads in a layer only because of the floor.
        surrogates: surrogates read in a layer and step.
        bytes: what a layer and step reads, in experts: the union, and the surrogates at their size. (Statistics that a
            choice needs, such as BASE's predictor, are not counted.) bytes_share: the same over stock's.
        kl: KL(stock || policy), nats per decoded token. top1_agreement: share of tokens.
        perplexity, perplexity_ratio: over all decoded tokens; the ratio is to stock.
        domains: perplexity and its ratio by domain.
        union_by_layer, stock_union_by_layer: means over steps, layers in order.
    """

    measured: Measured
    coreset: float | None
    union: Estimate
    union_share: Estimate
    natural_union: float
    pairs: float
    displaced_mass: Estimate
    expected_loss: Estimate
    overflow: float
    surrogates: float
    bytes: Estimate
    bytes_share: Estimate
    kl: Estimate
    top1_agreement: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate
    domains: dict[str, tuple[Estimate, Estimate]]
    union_by_layer: list[float]
    stock_union_by_layer: list[float]


def results(measured: list[Measured]) -> list[Result]:
    """Metrics of stock (the first) and of every plan measured on the same batches."""
    return [_result(one, measured[0]) for one in measured]


def _result(one: Measured, stock: Measured) -> Result:
    layout = one.layout
    layers = one.layers["union"].shape[1]
    steps_M = np.full(one.batches, float(layout.steps * layers))
    rows_M = steps_M * layout.batch_size * layout.stride
    per_batch = {name: sums_ML.sum(1) for name, sums_ML in one.layers.items()}
    stock_bytes_M = stock.layers["bytes"].sum(1)
    token_local = one.plan is None or one.plan.policy.kind == "token"

    def both(nll_M: Array, stock_M: Array, tokens_M: Array) -> tuple[Estimate, Estimate]:
        return (
            estimate(nll_M, tokens_M, "exp"),
            estimate(nll_M - stock_M, tokens_M, "exp"),
        )

    perplexity, perplexity_ratio = both(one.nll_MD.sum(1), stock.nll_MD.sum(1), one.tokens_M)
    return Result(
        measured=one,
        coreset=None if token_local else ratio(per_batch["coreset"], steps_M * layout.groups),
        union=estimate(per_batch["union"], steps_M),
        union_share=estimate(per_batch["union"], stock.layers["union"].sum(1)),
        natural_union=ratio(per_batch["natural_union"], steps_M),
        pairs=ratio(per_batch["pairs"], rows_M),
        displaced_mass=estimate(per_batch["displaced"], rows_M, "share"),
        expected_loss=estimate(per_batch["expected_loss"], rows_M, "share"),
        overflow=ratio(per_batch["overflow"], steps_M),
        surrogates=ratio(per_batch["surrogates"], steps_M),
        bytes=estimate(per_batch["bytes"], steps_M),
        bytes_share=estimate(per_batch["bytes"], stock_bytes_M),
        kl=estimate(one.kl_M, one.tokens_M, "log"),
        top1_agreement=estimate(one.agree_M, one.tokens_M, "share"),
        perplexity=perplexity,
        perplexity_ratio=perplexity_ratio,
        domains={
            name: both(one.nll_MD[:, index], stock.nll_MD[:, index], one.tokens_MD[:, index])
            for index, name in enumerate(one.domains)
            if one.tokens_MD[:, index].any()  # few sequences may leave a domain out
        },
        union_by_layer=_by_layer(one),
        stock_union_by_layer=_by_layer(stock),
    )


def _by_layer(one: Measured) -> list[float]:
    return (one.layers["union"].sum(0) / (one.batches * one.layout.steps)).tolist()
