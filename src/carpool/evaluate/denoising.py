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
from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.lockstep import Comparison
from carpool.evaluate.loop import Loop, MoE, sequences_per_pass
from carpool.evaluate.measure import require_enough
from carpool.evaluate.measured import Measured
from carpool.evaluate.sequences import Sequences
from carpool.plans.pipeline import Outcome
from carpool.plans.policy_file import AnyPlan
from carpool.routing.batch import Batch

RATIOS = (0.25, 0.5, 0.75, 1.0)  # masked share of a block; each sequence takes them in turn from a random one on


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
        return cls(rows, clean + decoded, clean, grouping, block=block)

    @property
    def stride(self) -> int:
        return self.block

    @property
    def prompt(self) -> int:
        """Tokens of a sequence that are never noisy, `P`."""
        return self.prefill + self.block - self.decoded

    def logits(self, model: Any, ids_SX: Tensor) -> Tensor:
        """Logits `[S * D, V]` of the noisy tokens, sequence by sequence, in the model's dtype."""
        mask, position_X = mask_of(self, model.dtype, ids_SX.device)
        found = model(
            input_ids=ids_SX, attention_mask=mask.expand(len(ids_SX), -1, -1, -1),
            position_ids=position_X.expand(len(ids_SX), -1), use_cache=False, logits_to_keep=self.decoded,
        )  # fmt: skip
        return found.logits.flatten(0, 1)


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


class ByRatio:
    """Sums over the masked tokens by the masked share of their block: tokens, KL, negative log-likelihood.

    Args:
        ratio_SD: of all sequences, in the order of the passes.
    """

    def __init__(self, ratio_SD: Tensor) -> None:
        self.sums = torch.zeros(len(RATIOS), 3, dtype=torch.float64)
        self._ratio_SD, self._done = ratio_SD, 0

    def begin(self, layout: Layout, part: Part) -> None:
        """Nothing to prepare."""

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        """Layers do not matter here."""

    def finish(self, part: Part, found: Comparison) -> None:
        """Add a pass."""
        ratio_SD = self._ratio_SD[self._done : self._done + len(part.ids_SX)]
        self._done += len(part.ids_SX)
        columns = (torch.ones_like(found.kl_R), found.kl_R, found.nll_R)
        self.sums.index_add_(0, part.counted(ratio_SD.flatten()), torch.stack(columns, 1).cpu())

    @property
    def by_ratio(self) -> dict[float, tuple[float, float, float]]:
        """By masked share, those that were seen."""
        found = zip(RATIOS, self.sums.tolist(), strict=True)
        return {ratio: (tokens, kl, nll) for ratio, (tokens, kl, nll) in found if tokens}


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
    allow_unchanged: bool = False,
    advance: Callable[[int], None] = lambda sequences: None,
) -> list[Denoised]:
    """Stock first, then every plan, over the first `batches * B` sequences.

    Args:
        advance: told the sequences of every pass that is done.

    Raises:
        CarpoolError: what `Loop.run` raises; fewer sequences than needed.
    """
    needed = require_enough(sequences, layout, batches)
    drawn = noise(needed, layout, seed)
    loop = Loop(model, moe, layout, parts(model, sequences, layout, drawn, mask_token), sequences.domains, stats=stats)
    ratios = [ByRatio(drawn.ratio_SD) for _ in (None, *plans)]
    found = loop.run(plans, watchers=ratios, allow_unchanged=allow_unchanged, advance=advance)
    return [Denoised(one, seen.by_ratio) for one, seen in zip(found, ratios, strict=True)]


def parts(model: Any, sequences: Sequences, layout: BlockLayout, drawn: Noise, mask_token: int) -> list[Part]:
    """The passes over the sequences that noise was drawn for."""
    made, size, needed = [], sequences_per_pass(model, layout), len(drawn.masked_SD)
    for first in range(0, needed, size):
        here = slice(first, min(first + size, needed))
        ids_ST, masked_SD = sequences.ids_ST[here], drawn.masked_SD[here]
        ids_SD = ids_ST[:, layout.prompt : layout.prompt + layout.decoded]
        given_SX = torch.cat([ids_ST[:, : layout.prefill], ids_SD.masked_fill(masked_SD, mask_token)], 1)
        made.append(Part(given_SX, ids_SD, sequences.domain_S[here], masked_SD))
    return made
