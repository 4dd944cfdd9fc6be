"""The model's side of block diffusion: forwards over one block of every sequence, and the cache of finished blocks.

Shapes: `B` sequences, `R` rows of a forward (sequences, or branches of them), `L` positions of a block, `C` columns of
the cache, `V` vocabulary. The mask is block-causal: a position sees its own block and all blocks before it (as in
SDAR, arXiv 2510.06303).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from carpool.diffusion.block_rows import block_rows
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.hosts.transformers.run import Run

FULL = "full_attention"


class Session:
    """A batch of sequences whose finished blocks lie in a KV cache.

    The full blocks of the prompts are read at once, under native routing. Sequences with fewer of them are padded on
    the left by whole blocks, so that the block being decoded stands in the same columns everywhere; padding is no real
    row and nobody sees it.

    Keys and values of finished blocks come from a forward of their own, by default under native routing: what the
    cache holds is then what the stock model makes of these tokens, whatever policy chose them, and a sequence does not
    depend on what decoded beside it. A policy acts in the denoising forwards, which write nothing.

    Attributes:
        phase: what the present (or last) forward is for.
        hidden_B: columns of the cache on the left that hold none of a sequence's tokens.
        rows: sequences that are left, `B`.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tensor],
        block: int,
        *,
        run: Run | None = None,
        share_commits: bool = False,
    ) -> None:
        """Reads the prompts.

        Args:
            model: a causal language model of transformers with full attention in all layers.
            prompts: token ids of each sequence, int64 `[P]`; may be empty.
            block: positions of a block, `L`.
            run: of `carpool.share`; None is stock.
            share_commits: the forwards that write the cache run under the policy, too.

        Raises:
            CarpoolError: a model whose attention takes no mask of our own, no prompt, a block below 1.
        """
        require_masks(model)
        if not len(prompts):
            raise CarpoolError("no prompt was given: name one or more")
        if block < 1:
            raise CarpoolError(f"block size {block}: give 1 or more")
        self.model, self.block, self.run, self.share_commits = model, block, run, share_commits
        self.device = next(model.parameters()).device
        self.phase: Literal["prefill", "denoise", "commit"] = "prefill"
        self._cache = self._new()
        self._some: tuple[list[int], Any] | None = None  # the cache of some rows only, while these rows are asked for
        full_B = torch.tensor([len(prompt) // block for prompt in prompts], device=self.device)
        self.hidden_B = (full_B.max() - full_B) * block
        if int(full_B.max()):
            self._prefill(prompts, int(full_B.max()) * block)

    @property
    def rows(self) -> int:
        return len(self.hidden_B)

    @property
    def start_B(self) -> Tensor:
        """Position of the first token of each sequence's current block."""
        return self._cache.get_seq_length() - self.hidden_B

    def denoise(
        self,
        tokens_RL: Tensor,
        rows: Sequence[int] | None = None,
        *,
        voter_RL: Tensor | None = None,
        real_RL: Tensor | None = None,
        computed_RL: Tensor | None = None,
    ) -> Tensor:
        """Logits `[R, L, V]` of the current block; nothing is written to the cache.

        Args:
            rows: the sequence of each row; default: each sequence once. A sequence that is named several times is
                decoded in as many branches, none of which sees another.
            voter_RL, real_RL: see `block_rows`.
            computed_RL: what goes through the experts, if the caller takes the other positions out before them.
        """
        self.phase = "denoise"
        rows = list(range(self.rows)) if rows is None else list(rows)
        cache = self._of(rows)
        who = {"voter_RL": voter_RL, "real_RL": real_RL, "computed_RL": computed_RL}
        output = self._forward(tokens_RL, rows, cache, exempt=False, **who)
        cache.crop(-self.block)
        return output.logits

    def commit(self, tokens_BL: Tensor) -> None:
        """Write the current block of every sequence to the cache and go on to the next."""
        self.phase = "commit"
        self._some = None
        rows = list(range(self.rows))
        self._forward(tokens_BL, rows, self._cache, exempt=not self.share_commits, logits_to_keep=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only; they are renumbered in this order."""
        index = torch.tensor(list(rows), device=self.device)
        self._some = None
        self._cache.batch_select_indices(index)  # does nothing to an empty one
        self.hidden_B = self.hidden_B[index]

    def _new(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _of(self, rows: list[int]) -> Any:
        """The cache of some rows. A copy of its own is kept as long as the same rows are asked for."""
        if not self._cache.get_seq_length():
            return self._new()  # an emptied cache still has its rows
        if rows == list(range(self.rows)):
            return self._cache
        if self._some is None or self._some[0] != rows:
            some = copy.copy(self._cache)
            some.layers = [copy.copy(layer) for layer in self._cache.layers]  # tensors are replaced, never written to
            some.batch_select_indices(torch.tensor(rows, device=self.device))
            self._some = rows, some
        return self._some[1]

    def _forward(
        self,
        tokens_RL: Tensor,
        rows: list[int],
        cache: Any,
        *,
        exempt: bool,
        voter_RL: Tensor | None = None,
        real_RL: Tensor | None = None,
        computed_RL: Tensor | None = None,
        **given: Any,
    ) -> Any:
        index_R = torch.tensor(rows, device=self.device)
        column_L = torch.arange(self.block, device=self.device)
        hidden_R = self.hidden_B[index_R]
        position_RL = (cache.get_seq_length() - hidden_R).unsqueeze(1) + column_L
        column_C = torch.arange(cache.get_seq_length() + self.block, device=self.device)
        seen_RC = column_C >= hidden_R.unsqueeze(1)
        seen_RLC = seen_RC.unsqueeze(1).expand(-1, self.block, -1)
        if self.run is not None:
            self.run.batch = block_rows(
                self.run.grouping, index_R, self.rows, position_RL, exempt=exempt, voter_RL=voter_RL, real_RL=real_RL
            )
            if computed_RL is not None:
                self.run.batch = self.run.batch.take(computed_RL.flatten())
        return self._call(tokens_RL, seen_RLC, position_RL, cache, **given)

    def _prefill(self, prompts: Sequence[Tensor], columns: int) -> None:
        tokens_BC = torch.zeros(len(prompts), columns, dtype=torch.int64, device=self.device)
        for row, (prompt, hidden) in enumerate(zip(prompts, self.hidden_B.tolist(), strict=True)):
            tokens_BC[row, hidden:] = prompt[: columns - hidden]
        column_C = torch.arange(columns, device=self.device)
        block_C, hidden_B1 = column_C // self.block, self.hidden_B.unsqueeze(1)
        real_BC = column_C >= hidden_B1
        earlier_CC = block_C.unsqueeze(1) >= block_C
        own_CC = block_C.unsqueeze(1) == block_C  # a row that sees nothing at all would be NaN
        seen_BCC = (earlier_CC & real_BC.unsqueeze(1)) | own_CC
        position_BC = (column_C - hidden_B1).clamp_min(0)
        if self.run is not None:
            requests_B = torch.arange(len(prompts), device=self.device)
            self.run.batch = block_rows(
                self.run.grouping, requests_B, len(prompts), position_BC, exempt=True, real_RL=real_BC
            )
        self._call(tokens_BC, seen_BCC, position_BC, self._cache, logits_to_keep=1)

    def _call(self, tokens_RL: Tensor, seen_RLC: Tensor, position_RL: Tensor, cache: Any, **given: Any) -> Any:
        """One forward of the model under a mask that says which columns each position sees."""
        mask_R1LC = torch.zeros(seen_RLC.shape, dtype=self.model.dtype, device=self.device)
        mask_R1LC = mask_R1LC.masked_fill(~seen_RLC, torch.finfo(self.model.dtype).min).unsqueeze(1)
        try:
            with torch.inference_mode():
                return self.model(
                    input_ids=tokens_RL.to(self.device), attention_mask=mask_R1LC, position_ids=position_RL,
                    past_key_values=cache, use_cache=True, **given,
                )  # fmt: skip
        finally:
            if self.run is not None:
                self.run.batch = None


def require_masks(model: Any) -> None:
    """Raises CarpoolError unless the model's attention takes the mask that it is given, in every layer."""
    config = model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise CarpoolError(
            f"attention {attention!r} takes no block-causal mask; load the model with attn_implementation='sdpa'"
        )
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {FULL} or sliding is not None:
        what = f"a sliding window of {sliding}" if sliding is not None else f"layers of {', '.join(sorted(kinds))}"
        raise CarpoolError(f"block diffusion needs full attention in every layer; this model has {what}")
