"""Which rows of a parallel forward pass make up one decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.routing.batch import Batch, Grouping


class Steps(Protocol):
    """What lockstep evaluation has to know of the rows of a pass; `Layout` says what the members mean."""

    @property
    def batch_size(self) -> int: ...

    @property
    def grouping(self) -> Grouping: ...

    def batch(self, copies: int, device: torch.device | str = "cpu") -> Batch: ...

    def by_step(self, values_S: Tensor, copies: int) -> Tensor: ...

    def by_token(self, values_N: Tensor, copies: int) -> Tensor: ...

    def logits(self, model: Any, ids_ST: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """`B` sequences of `T` positions that decode in lockstep.

    Rows are flattened as the model does it: batch by batch, sequence by sequence, position by position. The first
    `P` positions are the prompt: exempt, and in a step of their own, so that what they read is free for nobody.
    A step holds one position of every sequence; with `block:n` it holds `n` positions of every sequence, as when drafts
    are verified or a diffusion model decodes a block.

    Attributes:
        batch_size: sequences of a batch, `B`.
        positions: inputs of a sequence, `T`.
        prefill: prompt positions, `P`.
        grouping: which rows share a coreset.
        samples: how many consecutive sequences are samples of one prompt, for the grouping `prompt`.
    """

    batch_size: int
    positions: int
    prefill: int
    grouping: Grouping
    samples: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise CarpoolError(f"batch {self.batch_size}: give a number of sequences, 1 or more")
        if self.grouping.kind == "tenant":
            raise CarpoolError("an evaluation's sequences have no tenants; group by batch, request or block:n")
        if self.grouping.kind == "prompt" and self.samples == 1:
            raise CarpoolError(
                "group='prompt': these sequences are of different documents, so none is another's sample; group by "
                "batch, request or block:n"
            )
        if self.samples < 1 or self.batch_size % self.samples:
            raise CarpoolError(
                f"a batch of {self.batch_size} sequences does not split into prompts of {self.samples} samples"
            )
        if self.prefill < 1:
            raise CarpoolError(f"prefill {self.prefill}: a sequence starts from a prompt of at least 1 token")
        if self.positions <= self.prefill:
            raise CarpoolError(
                f"sequences of {self.positions} tokens leave nothing to decode after a prefill of {self.prefill}: "
                "raise --sequence or lower --prefill"
            )
        if self.decoded % self.stride:
            raise CarpoolError(
                f"{self.decoded} decoded positions ({self.positions} less a prefill of {self.prefill}) do not split "
                f"into blocks of {self.stride}: change --sequence or --prefill"
            )

    @property
    def decoded(self) -> int:
        """Decoded positions of a sequence."""
        return self.positions - self.prefill

    @property
    def stride(self) -> int:
        """Positions of a sequence in one step."""
        return self.grouping.block or 1

    @property
    def steps(self) -> int:
        """Decoding steps of a batch."""
        return self.decoded // self.stride

    @property
    def groups(self) -> int:
        """Groups of a step."""
        if self.grouping.kind == "prompt":
            return self.batch_size // self.samples
        return 1 if self.grouping.kind in ("batch", "position") else self.batch_size

    def batch(self, copies: int, device: torch.device | str = "cpu") -> Batch:
        """Rows of `copies` batches in one forward pass, `N = copies * B * T`; their steps and groups are apart.

        Each copy has `steps + 1` steps, the last of which holds the prompts.
        """
        position_T = torch.arange(self.positions, device=device)
        exempt_T = position_T < self.prefill
        own_T = torch.where(exempt_T, self.steps, (position_T - self.prefill) // self.stride)
        copy_M11 = torch.arange(copies, device=device).view(-1, 1, 1)
        shape = (copies, self.batch_size, self.positions)
        step_N = (copy_M11 * (self.steps + 1) + own_T).expand(shape).flatten()
        num_steps = copies * (self.steps + 1)
        group_N = step_N
        if self.groups > 1:
            row_B1 = torch.arange(self.batch_size, device=device).view(-1, 1) // (self.batch_size // self.groups)
            group_N = (step_N.view(shape) * self.groups + row_B1).flatten()
        return Batch.of(
            step_N.numel(), device=device, exempt_N=exempt_T.expand(shape).flatten(),
            group_N=group_N, num_groups=num_steps * self.groups, step_N=step_N, num_steps=num_steps,
        )  # fmt: skip

    def by_step(self, values_S: Tensor, copies: int) -> Tensor:
        """Values of steps (or of groups), summed over the decoding steps of each batch, `[M]`."""
        return values_S.view(copies, self.steps + 1, -1)[:, : self.steps].sum((1, 2))

    def by_token(self, values_N: Tensor, copies: int) -> Tensor:
        """Values of rows, summed over the decoded positions of each batch, `[M]`."""
        return values_N.view(copies, self.batch_size, self.positions)[..., self.prefill :].sum((1, 2))

    def logits(self, model: Any, ids_ST: Tensor) -> Tensor:
        """Logits `[R, V]` of the decoded positions, sequence by sequence, in the model's dtype."""
        return model(input_ids=ids_ST, use_cache=False, logits_to_keep=self.decoded).logits.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Part:
    """What one pass reads.

    Attributes:
        ids_SX: inputs, as the layout has their positions.
        targets_SD: the text's tokens that the decoded positions predict.
        domain_S: index of each sequence's domain.
        counted_SD: which of the decoded tokens are compared; None: all.
    """

    ids_SX: Tensor
    targets_SD: Tensor
    domain_S: Tensor
    counted_SD: Tensor | None = None

    def counted(self, values_X: Tensor) -> Tensor:
        """Of values of all decoded tokens `[S * D, ...]` those that are compared, `[R, ...]`."""
        return values_X if self.counted_SD is None else values_X[self.counted_SD.flatten().to(values_X.device)]
