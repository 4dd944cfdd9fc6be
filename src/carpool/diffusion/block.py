"""Settings, state and results of block diffusion decoding.

Shapes: `B` requests, `A` of them that still decode, `R` rows of a forward, `L` positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError


@dataclass(frozen=True)
class Decoding:
    """How blocks are decoded.

    Attributes:
        block: positions of a block, `L`.
        mask_token: id that stands for a position without a token; never generated.
        threshold: a prediction whose probability exceeds it is accepted.
        max_new: tokens to generate for each request.
        steps: most forwards of a block, 1 to `L` (None: `L`). Each accepts at least `L / steps` predictions, the most
            probable ones where too few exceed the threshold.
        end_tokens: generation of a request stops after the block that holds one of them.
    """

    block: int
    mask_token: int
    threshold: float = 0.9
    max_new: int = 128
    steps: int | None = None
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.block < 1:
            raise CarpoolError(f"block size {self.block}: give 1 or more")
        if not 0 <= self.threshold <= 1:
            raise CarpoolError(f"threshold {self.threshold}: give a probability, 0 to 1")
        if self.max_new < 1:
            raise CarpoolError(f"{self.max_new} new tokens: give 1 or more")
        if self.steps is not None and not 1 <= self.steps <= self.block:
            raise CarpoolError(f"{self.steps} steps for blocks of {self.block}: give 1 to {self.block}")
        if self.mask_token < 0:
            raise CarpoolError(f"mask token {self.mask_token}: give the id of a token, 0 or more")

    def least(self, step: int) -> int:
        """Predictions that forward `step` of a block accepts at least; over all steps they add up to `L`."""
        steps = self.steps or self.block
        return self.block // steps + (step < self.block % steps)

    @classmethod
    def of(cls, model: Any, *, mask_token: int | None = None, block: int | None = None, **given: Any) -> Decoding:
        """Settings with what a model's configuration says: `mask_token_id`, `block_size`, its end tokens.

        Raises:
            CarpoolError: no mask token is known, or it is none of the model's tokens.
        """
        config = model.config.get_text_config()
        mask_token = getattr(config, "mask_token_id", None) if mask_token is None else mask_token
        if mask_token is None:
            raise CarpoolError(
                "the model's config.json has no mask_token_id, so it is no block diffusion model or does not say so; "
                "name the id of its mask token with --mask-token (mask_token=...)"
            )
        if not 0 <= mask_token < config.vocab_size:
            raise CarpoolError(f"mask token {mask_token} is none of the model's {config.vocab_size} tokens")
        block = getattr(config, "block_size", None) if block is None else block
        if block is None:
            raise CarpoolError(
                "the model's config.json has no block_size; name the one it was trained with: --block-size (block=...)"
            )
        if "end_tokens" not in given:
            ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            ends = getattr(config, "eos_token_id", None) if ends is None else ends
            given["end_tokens"] = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
        return cls(block=block, mask_token=mask_token, **given)


@dataclass(eq=False)
class Block:
    """One block of every request that still decodes, while it is denoised.

    Attributes:
        number: blocks that were decoded before.
        request_A: which of the requests the rows are.
        tokens_AL: with the mask token where none is accepted yet.
        masked_AL: positions without a token.
        predicted_AL, confidence_AL: likeliest token and its probability in the row's last forward (-1 before one; at
            positions that had a token then, too).
        age_AL: forwards that a position has been through since it got its token; 0 where masked or just accepted.
        steps_A: forwards of the row in this block.
    """

    number: int
    request_A: Tensor
    tokens_AL: Tensor
    masked_AL: Tensor
    predicted_AL: Tensor = field(init=False)
    confidence_AL: Tensor = field(init=False)
    age_AL: Tensor = field(init=False)
    steps_A: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.predicted_AL = torch.full_like(self.tokens_AL, -1)
        self.confidence_AL = torch.full(self.tokens_AL.shape, -1.0, device=self.tokens_AL.device)
        self.age_AL = torch.zeros_like(self.tokens_AL)
        self.steps_A = torch.zeros_like(self.request_A)

    def active(self) -> list[int]:
        """Rows that have a masked position left."""
        return self.masked_AL.any(1).nonzero().flatten().tolist()

    def accept(self, rows: list[int], predicted_RL: Tensor, confidence_RL: Tensor, accepted_RL: Tensor) -> Forward:
        """Record one forward over some rows: what it predicted, and which predictions stay for good."""
        masked_RL = self.masked_AL[rows]
        forward = Forward(self.number, self.request_A[rows], masked_RL, accepted_RL, predicted_RL, confidence_RL)
        self.predicted_AL[rows] = predicted_RL
        self.confidence_AL[rows] = confidence_RL.to(self.confidence_AL.dtype)
        self.age_AL[rows] += ~masked_RL
        self.tokens_AL[rows] = torch.where(accepted_RL, predicted_RL, self.tokens_AL[rows])
        self.masked_AL[rows] = masked_RL & ~accepted_RL
        self.steps_A[rows] += 1
        return forward


@dataclass(frozen=True, eq=False)
class Forward:
    """One denoising forward.

    Attributes:
        block: number of the block.
        request_R: which requests took part (the others had finished this block).
        masked_RL: positions without a token before it.
        accepted_RL: of these, those that got theirs.
        predicted_RL, confidence_RL: likeliest token of every position, and its probability.
    """

    block: int
    request_R: Tensor
    masked_RL: Tensor
    accepted_RL: Tensor
    predicted_RL: Tensor
    confidence_RL: Tensor


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated.

    Attributes:
        tokens: new tokens of each request, int64; cut after its first end token and at `max_new`.
        blocks: all that was decoded, prompt tail included, cut to nothing: int64 `[blocks, L]` of each request.
        forwards: the denoising forwards in order. Writing a block to the cache takes one more forward each (`commits`).
        commits: forwards that wrote finished blocks to the cache.
    """

    tokens: list[Tensor]
    blocks: list[Tensor]
    forwards: list[Forward]
    commits: int

    @property
    def forwards_B(self) -> Tensor:
        """Denoising forwards that each request took part in."""
        return self._count(lambda forward: torch.ones_like(forward.request_R))

    @property
    def accepted_B(self) -> Tensor:
        """Tokens that each request decoded, those after an end token or beyond `max_new` included."""
        return self._count(lambda forward: forward.accepted_RL.sum(1))

    @property
    def tokens_per_forward(self) -> float:
        """Tokens accepted for a request in a denoising forward, mean over both; 0.0 without any forward."""
        forwards = int(self.forwards_B.sum())
        return int(self.accepted_B.sum()) / forwards if forwards else 0.0

    def _count(self, of: Any) -> Tensor:
        total_B = torch.zeros(len(self.tokens), dtype=torch.int64)
        for forward in self.forwards:
            total_B.index_add_(0, forward.request_R.cpu(), of(forward).cpu())
        return total_B
