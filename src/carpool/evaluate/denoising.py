"""Denoising loss of held-out text: one parallel forward computes what denoising a text block by block computes.

Every block is denoised after the clean text before it. The input holds that text and, behind it, all blocks with some
of their tokens masked; a noisy block sees the clean blocks before it and itself (the training pass of block diffusion,
arXiv 2503.09573). Clean rows are exempt, as the forwards that fill the cache are.

Shapes as in `carpool.evaluate.lockstep`: `M` batches, `B` sequences, `P` prompt tokens, `D` tokens in noisy blocks of
`L`; `T = P + D - L` clean tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.evaluate.details import Details
from carpool.evaluate.intervals import Array
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS, Watch, compare
from carpool.evaluate.measure import Measured, MoE
from carpool.evaluate.sequences import Sequences
from carpool.plans.policy_file import AnyPlan, stats_for

RATIOS = (0.25, 0.5, 0.75, 1.0)  # masked share of a block; each sequence takes them in turn from a random one on
ROWS_PER_PASS = 4096


@dataclass(frozen=True)
class BlockLayout(Layout):
    """Rows of such a pass: `positions` counts clean and noisy ones, `prefill` the clean ones.

    Attributes:
        block: positions of a noisy block, `L`; one block of every sequence is a step.
    """

    block: int = 1

    @classmethod
    def of(cls, rows: int, prompt: int, decoded: int, block: int, grouping: Any) -> BlockLayout:
        """Of sequences with `P` prompt tokens and `D` decoded ones.

        Raises:
            CarpoolError: lengths that do not split into blocks, or a grouping that says nothing here.
        """
        if prompt < block or prompt % block or decoded < block or decoded % block:
            raise CarpoolError(
                f"{prompt} prompt and {decoded} decoded tokens do not split into blocks of {block}: change --prefill, "
                "--sequence or --block-size"
            )
        if grouping.kind not in ("batch", "request"):
            raise CarpoolError(f"grouping {grouping} for a block diffusion model: use request or batch")
        clean = prompt + decoded - block
        return cls(rows, clean + decoded, clean, grouping, block)

    @property
    def stride(self) -> int:
        return self.block

    @property
    def prompt(self) -> int:
        """Tokens of a sequence that are never noisy, `P`."""
        return self.prefill + self.block - self.decoded


@dataclass(frozen=True, eq=False)
class Noise:
    """Which tokens are masked, for all plans alike.

    Attributes:
        masked_SD: of each sequence's decoded tokens.
        ratio_SD: index into `RATIOS`, of the block that a token lies in.
    """

    masked_SD: Tensor
    ratio_SD: Tensor


def noise(sequences: int, layout: BlockLayout, seed: int) -> Noise:
    """Masks `round(ratio * L)` tokens of every block, at least one."""
    rng = np.random.default_rng(seed)
    blocks, L = layout.steps, layout.block
    first_S1 = rng.integers(len(RATIOS), size=(sequences, 1))
    ratio_SJ = (first_S1 + np.arange(blocks)) % len(RATIOS)
    count_SJ1 = np.maximum(1, np.rint(np.array(RATIOS)[ratio_SJ] * L))[..., None]
    rank_SJL = rng.random((sequences, blocks, L)).argsort(-1).argsort(-1)
    masked_SD = torch.from_numpy(rank_SJL < count_SJ1).flatten(1)
    return Noise(masked_SD, torch.from_numpy(ratio_SJ).repeat_interleave(L, 1))


def mask_of(layout: BlockLayout, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Additive mask `[1, 1, X, X]` and positions `[X]` of a pass over `X = T + D` tokens."""
    clean_T = torch.arange(layout.prefill, device=device)
    noisy_D = torch.arange(layout.prompt, layout.prompt + layout.decoded, device=device)
    position_X = torch.cat([clean_T, noisy_D])
    is_noisy_X = torch.arange(len(position_X), device=device) >= layout.prefill
    block_X = position_X // layout.block
    query_X1, key_X = block_X.unsqueeze(1), block_X
    clean_seen_XX = ~is_noisy_X & torch.where(is_noisy_X.unsqueeze(1), key_X < query_X1, key_X <= query_X1)
    own_XX = is_noisy_X & is_noisy_X.unsqueeze(1) & (key_X == query_X1)
    mask_XX = torch.zeros(len(position_X), len(position_X), dtype=dtype, device=device)
    mask_XX = mask_XX.masked_fill(~(clean_seen_XX | own_XX), torch.finfo(dtype).min)
    return mask_XX[None, None], position_X


@dataclass(frozen=True, eq=False)
class Denoised:
    """Sums of one plan.

    Attributes:
        measured: as of a lockstep evaluation, where the tokens are the masked ones.
        by_ratio: by masked share of the block: masked tokens, and sums over them of KL and of negative log-likelihood.
    """

    measured: Measured
    by_ratio: dict[float, tuple[float, float, float]]


def denoise(
    model: Any,
    moe: MoE,
    plans: Sequence[AnyPlan],
    sequences: Sequences,
    layout: BlockLayout,
    batches: int,
    mask_token: int,
    *,
    seed: int = 0,
    stats: Any = None,
    advance: Callable[[int], None] = lambda sequences: None,
) -> list[Denoised]:
    """Stock first, then every plan, over the first `batches * B` sequences.

    Args:
        advance: told the sequences of every pass that is done.

    Raises:
        CarpoolError: what `share` raises; logits that are not finite; fewer sequences than needed.
    """
    needed = batches * layout.batch_size
    if needed > len(sequences.ids_ST):
        raise CarpoolError(
            f"{batches} batches of {layout.batch_size} need {needed} sequences, not {len(sequences.ids_ST)}"
        )
    drawn = noise(needed, layout, seed)
    size = layout.batch_size * max(1, ROWS_PER_PASS // (layout.batch_size * layout.positions))
    tallies = [_Tally(plan, layout, sequences.domains, moe) for plan in (None, *plans)]
    for first in range(0, needed, size):
        here = slice(first, min(first + size, needed))
        ids_SD = sequences.ids_ST[here, layout.prompt : layout.prompt + layout.decoded]
        masked_SD = drawn.masked_SD[here]
        noisy_SD = ids_SD.masked_fill(masked_SD, mask_token)
        given_SX = torch.cat([sequences.ids_ST[here, : layout.prefill], noisy_SD], 1)
        stock_RV = None
        for tally in tallies:
            logits_RV, layers_LFM = _forward(model, tally.plan or moe.stock, given_SX, masked_SD, layout, moe, stats)
            stock_RV = logits_RV if stock_RV is None else stock_RV
            tally.add(
                stock_RV, logits_RV, layers_LFM, ids_SD, masked_SD, drawn.ratio_SD[here], sequences.domain_S[here]
            )
            advance(len(given_SX))
    return [tally.result() for tally in tallies]


def _forward(
    model: Any, plan: AnyPlan, given_SX: Tensor, masked_SD: Tensor, layout: BlockLayout, moe: MoE, stats: Any
) -> tuple[Tensor, Tensor]:
    """Logits of the masked tokens `[R, V]`, and what the layers did, `[layers, fields, M]`."""
    from carpool.hosts.transformers import share

    copies, device = len(given_SX) // layout.batch_size, next(model.parameters()).device
    watch = Watch(layout, copies)
    mask, position_X = mask_of(layout, model.dtype, device)
    how: dict[str, Any] = {"stats": stats_for(plan, stats), "batch": layout.batch(copies, device), "observe": watch}
    with torch.inference_mode(), share(model, plan, **how) as run:
        watch.shares = run.surrogate_shares()
        output = model(
            input_ids=given_SX.to(device), attention_mask=mask.expand(len(given_SX), -1, -1, -1),
            position_ids=position_X.expand(len(given_SX), -1), use_cache=False, logits_to_keep=layout.decoded,
        )  # fmt: skip
    if len(watch.sums) != moe.layers:
        raise CarpoolError(f"{plan} ran in {len(watch.sums)} of {moe.layers} MoE layers: the model skips its routers")
    logits_RV = output.logits[masked_SD.to(device)]
    return logits_RV, torch.stack([watch.sums[layer] for layer in sorted(watch.sums)]).cpu()


class _Tally:
    def __init__(self, plan: AnyPlan | None, layout: BlockLayout, domains: tuple[str, ...], moe: MoE) -> None:
        self.plan, self.layout, self.domains, self.moe = plan, layout, domains, moe
        self.layers: list[Tensor] = []
        self.tokens: list[Array] = []
        self.ratios = torch.zeros(len(RATIOS), 3, dtype=torch.float64)

    def add(
        self, stock_RV: Tensor, run_RV: Tensor, layers_LFM: Tensor, ids_SD: Tensor, masked_SD: Tensor,
        ratio_SD: Tensor, domain_S: Tensor,
    ) -> None:  # fmt: skip
        found = compare(stock_RV, run_RV, ids_SD[masked_SD].to(run_RV.device))
        rows = [torch.ones(len(found.kl_R), dtype=torch.float64), *(x.cpu() for x in (found.kl_R, found.nll_R))]
        self.ratios.index_add_(0, ratio_SD[masked_SD], torch.stack(rows, 1))
        sequence_R = masked_SD.nonzero()[:, 0]
        columns = [found.kl_R.cpu(), found.agree_R.cpu(), found.nll_R.cpu(), rows[0]]
        sums_SX = torch.zeros(len(ids_SD), 4, dtype=torch.float64).index_add_(0, sequence_R, torch.stack(columns, 1))
        one_hot_SD = torch.nn.functional.one_hot(domain_S, len(self.domains)).double()
        parts = [sums_SX[:, :2], one_hot_SD * sums_SX[:, 2:3], one_hot_SD * sums_SX[:, 3:]]
        self.tokens.append(torch.cat(parts, 1).unflatten(0, (-1, self.layout.batch_size)).sum(1).numpy())
        self.layers.append(layers_LFM)

    def result(self) -> Denoised:
        fields_LFM, tokens_MX = torch.cat(self.layers, dim=-1).numpy(), np.concatenate(self.tokens)
        count = len(self.domains)
        measured = Measured(
            plan=self.plan, layout=self.layout, domains=self.domains,
            layers={name: fields_LFM[:, index].T for index, name in enumerate(LAYER_FIELDS)},
            kl_M=tokens_MX[:, 0], agree_M=tokens_MX[:, 1],
            nll_MD=tokens_MX[:, 2 : 2 + count], tokens_MD=tokens_MX[:, 2 + count :],
            details=Details.empty(count, self.moe.layers, self.moe.experts),
        )  # fmt: skip
        by_ratio = {ratio: tuple(sums) for ratio, sums in zip(RATIOS, self.ratios.tolist(), strict=True) if sums[0]}
        return Denoised(measured, by_ratio)
