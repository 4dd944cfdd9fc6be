"""TEAM's decoding on block diffusion: few rows choose the experts, decoded ones rest, likely tokens are tried ahead.

Based on TEAM (arXiv 2602.08404; what the paper leaves open follows its authors' code). A position of a block is
*decoded* (it has its token), *hot* (masked, but its prediction is sure or a token stands near it) or *cold*. Three
parts, which work alone and together:

- `TeamCold`: hot and freshly decoded rows choose the experts, cold rows ride on them.
- `reuse`: a row that has been through a forward with its token keeps what the experts made of it then.
- `branches`: the two surest predictions are tried ahead, each alone and both, in branches of the same forward; a branch
  is taken where the forward itself accepts what it guessed.

Shapes: `R` rows of `L` positions that are not finished, `F` branches of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.diffusion.block import Block, Decoding, Forward
from carpool.diffusion.loop import predict, sure
from carpool.diffusion.outputs import Outputs
from carpool.diffusion.session import Session
from carpool.routing.cold import TeamCold, ranks

COLD = TeamCold()


class Team:
    """A denoising step as TEAM takes it: `step` of `generate`, one instance a generation.

    Args:
        cold: who chooses experts; None: all rows.
        reuse: rows that have been through a forward with their token do not go through the experts again in this
            block. They are still read by the attention of others, with keys and values computed anew.
        branches: try the two surest predictions of the last forward ahead.
    """

    def __init__(self, cold: TeamCold | None = COLD, *, reuse: bool = True, branches: bool = True) -> None:
        self.cold, self.reuse, self.branches = cold, reuse, branches
        self._block: Block | None = None
        self._outputs = Outputs()

    def __call__(self, session: Session, block: Block, decoding: Decoding) -> list[Forward]:
        """One forward over the rows that are not finished, each in one or four branches."""
        if block is not self._block:
            self._block = block
            self._outputs.clear()
        rows = block.active()
        guess_RL, rank_RL = block.predicted_AL[rows], ranks(block.masked_AL[rows], block.confidence_AL[rows])
        owner_F, tried_FL = self._branches(block, rows, rank_RL)
        masked_FL = block.masked_AL[rows][owner_F] & ~tried_FL
        tokens_FL = torch.where(tried_FL, guess_RL[owner_F], block.tokens_AL[rows][owner_F])
        logits_FLV = self._forward(session, block, rows, owner_F, tried_FL, tokens_FL)
        predicted_FL, confidence_FL = predict(logits_FLV, decoding.mask_token)
        least_R = torch.tensor([decoding.least(done) for done in block.steps_A[rows].tolist()], device=session.device)
        accepted_FL = sure(confidence_FL, masked_FL, decoding.threshold, least_R[owner_F])
        chosen_R = choose(owner_F, tried_FL, rank_RL, accepted_FL & (predicted_FL == guess_RL[owner_F]))
        self._outputs.keep(rows, chosen_R)
        tried_RL = tried_FL[chosen_R]
        predicted_RL = torch.where(tried_RL, guess_RL, predicted_FL[chosen_R])
        confidence_RL = torch.where(tried_RL, block.confidence_AL[rows], confidence_FL[chosen_R].float())
        return [block.accept(rows, predicted_RL, confidence_RL, accepted_FL[chosen_R] | tried_RL)]

    def _branches(self, block: Block, rows: list[int], rank_RL: Tensor) -> tuple[Tensor, Tensor]:
        """The row of every branch, `[F]`, and where it holds a guess, `[F, L]`. Rows in the first forward of a block
        have nothing to guess, and the last masked position gains nothing: one branch."""
        several_R = (block.steps_A[rows] > 0) & (block.masked_AL[rows].sum(1) > 1) & self.branches
        owner, tried = [], []
        for row, several in enumerate(several_R.tolist()):
            first_L, second_L = rank_RL[row] == 0, rank_RL[row] == 1
            none_L = torch.zeros_like(first_L)
            made = [none_L, first_L, second_L, first_L | second_L] if several else [none_L]
            owner += [row] * len(made)
            tried += made
        return torch.tensor(owner, device=rank_RL.device), torch.stack(tried)

    def _forward(
        self, session: Session, block: Block, rows: list[int], owner_F: Tensor, tried_FL: Tensor, tokens_FL: Tensor
    ) -> Tensor:
        voter_FL = None
        if self.cold is not None:  # a row votes alike in all of its branches, and what stands near a guess is hot
            tried_RL = torch.stack([tried_FL[owner_F == row].any(0) for row in range(len(rows))])
            voter_FL = self.cold(block, rows, tried_RL)[owner_F]
        branch_rows = [rows[owner] for owner in owner_F.tolist()]
        if not self.reuse:
            return session.denoise(tokens_FL, branch_rows, voter_RL=voter_FL)
        rests_FL = (block.age_AL[rows] > 0)[owner_F]
        with self._outputs.reused(session.model, branch_rows, rests_FL):
            return session.denoise(tokens_FL, branch_rows, voter_RL=voter_FL, computed_RL=~rests_FL)


def choose(owner_F: Tensor, tried_FL: Tensor, rank_RL: Tensor, confirmed_FL: Tensor) -> Tensor:
    """The branch `[R]` that each row goes on with.

    A guess is confirmed where a branch that lacks it accepts the same token. The branch with both guesses is taken if
    both are confirmed by the row as it is, or one is and the branch that holds it confirms the other; else the branch
    of a confirmed guess, the surer one first; else the row as it is.

    Args:
        confirmed_FL: positions that a branch accepts with the guessed token.
    """
    chosen = []
    for row in range(len(rank_RL)):
        branches = (owner_F == row).nonzero().flatten().tolist()
        which = branches[0]
        if len(branches) == 4:
            first, second = (int((rank_RL[row] == rank).nonzero()[0, 0]) for rank in (0, 1))
            confirms = confirmed_FL[branches].tolist()
            one, two = confirms[0][first], confirms[0][second]
            if (one and two) or (one and confirms[1][second]) or (two and confirms[2][first]):
                which = branches[3]
            elif one or two:
                which = branches[1] if one else branches[2]
        chosen.append(which)
    return torch.tensor(chosen, device=owner_F.device)
