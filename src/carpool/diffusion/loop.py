"""Mask block diffusion: the positions of a block are filled in parallel, the surest predictions first.

The loop of SDAR (arXiv 2510.06303) and LLaDA2 (arXiv 2512.15745): a block starts as mask tokens (after the tail of the
prompt that fills no block); every forward predicts all of them and accepts what is sure; an accepted token stays. A
finished block is written to the cache, and the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from carpool.diffusion.block import Block, Decoding, Forward, Generation
from carpool.diffusion.session import Session
from carpool.errors import CarpoolError

Voters = Callable[[Block, list[int]], Tensor | None]
Step = Callable[[Session, Block, Decoding], list[Forward]]


def generate(
    session: Session,
    prompts: Sequence[Tensor],
    decoding: Decoding,
    *,
    step: Step | None = None,
    voters: Voters | None = None,
    watch: Callable[[Block], None] = lambda block: None,
    follow: Sequence[Tensor] | None = None,
) -> Generation:
    """Decode every request, block by block; the requests of a batch go through their blocks together.

    A request whose block is finished waits for the others without taking part in their forwards, and one that met an
    end token or has all its tokens leaves the batch: neither has a row.

    Args:
        session: made of the same prompts; of `carpool.share`'s run, if it has one.
        prompts: token ids of each request, int64 `[P]`.
        step: what one denoising step does; default: `step`, with `voters`.
        voters: which rows of the next forward vote, bool `[R, L]`, given the block and the rows that take part.
        watch: told the block before its first forward and after each.
        follow: `Generation.blocks` of another run, whose tokens are written to the cache in place of the block's own,
            so that every block is decoded after the same text as there.

    Raises:
        CarpoolError: more positions than the model has, or a session of other prompts or another block size.
    """
    _require_room(session, prompts, decoding)
    L = decoding.block
    taken: Step = partial(step_by_threshold, voters=voters) if step is None else step
    prompts = [prompt.to(session.device, torch.int64) for prompt in prompts]
    tails = [prompt[len(prompt) // L * L :] for prompt in prompts]
    needed = [-(-(len(tail) + decoding.max_new) // L) for tail in tails]  # blocks of each request
    ends = torch.tensor(decoding.end_tokens, dtype=torch.int64, device=session.device)
    made: list[list[Tensor]] = [[] for _ in prompts]
    forwards: list[Forward] = []
    request_A = torch.arange(len(prompts), device=session.device)
    number = 0
    while len(request_A):
        tokens_AL = torch.full((len(request_A), L), decoding.mask_token, device=session.device)
        given_AL = torch.zeros_like(tokens_AL, dtype=torch.bool)
        if number == 0:
            for row, tail in enumerate(tails):
                tokens_AL[row, : len(tail)] = tail
                given_AL[row, : len(tail)] = True
        block = Block(number, request_A, tokens_AL, ~given_AL)
        watch(block)
        while block.masked_AL.any():
            forwards += taken(session, block, decoding)
            watch(block)
        ended_A = (torch.isin(block.tokens_AL, ends) & ~given_AL).any(1)
        for row, request in enumerate(request_A.tolist()):
            made[request].append(block.tokens_AL[row].clone())
            ended_A[row] |= len(made[request]) == needed[request]
        number += 1
        left = (~ended_A).nonzero().flatten().tolist()
        if left:  # the last block of a request is followed by nothing that could look at it
            if len(left) < len(request_A):
                session.keep(left)
            done_AL = block.tokens_AL[left]
            if follow is not None:
                done_AL = torch.stack([follow[request][number - 1] for request in request_A[left].tolist()])
            session.commit(done_AL)
        request_A = request_A[left]
    blocks = [torch.stack(one) for one in made]
    tokens = [
        _cut(one.flatten()[len(tail) : len(tail) + decoding.max_new], ends)
        for one, tail in zip(blocks, tails, strict=True)
    ]
    return Generation(tokens, blocks, forwards, number - 1)


def step_by_threshold(
    session: Session, block: Block, decoding: Decoding, voters: Voters | None = None
) -> list[Forward]:
    """One forward over the rows that are not finished; accepts what exceeds the threshold, or the surest few."""
    rows = block.active()
    voter_RL = None if voters is None else voters(block, rows)
    logits_RLV = session.denoise(block.tokens_AL[rows], rows, voter_RL=voter_RL)
    predicted_RL, confidence_RL = predict(logits_RLV, decoding.mask_token)
    least_R = torch.tensor([decoding.least(done) for done in block.steps_A[rows].tolist()], device=session.device)
    accepted_RL = sure(confidence_RL, block.masked_AL[rows], decoding.threshold, least_R)
    return [block.accept(rows, predicted_RL, confidence_RL, accepted_RL)]


def predict(logits_RLV: Tensor, mask_token: int) -> tuple[Tensor, Tensor]:
    """The likeliest token of every position and its probability, the mask token left out; float32 at least.

    Position `i` predicts its own token, not the next one.
    """
    dtype = torch.promote_types(logits_RLV.dtype, torch.float32)
    logits_RLV = logits_RLV.to(dtype, copy=True)
    logits_RLV[..., mask_token] = -torch.inf
    confidence_RL, predicted_RL = logits_RLV.softmax(-1).max(-1)
    return predicted_RL, confidence_RL


def sure(confidence_RL: Tensor, masked_RL: Tensor, threshold: float, least_R: Tensor) -> Tensor:
    """Masked positions whose confidence exceeds the threshold; in rows with fewer than `least_R` of them, so many of
    the surest masked positions (ties: the first)."""
    over_RL = masked_RL & (confidence_RL > threshold)
    ranked_RL = torch.where(masked_RL, confidence_RL, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank_RL = ranked_RL.argsort(dim=-1)
    surest_RL = masked_RL & (rank_RL < least_R.unsqueeze(1))
    return torch.where((over_RL.sum(1) < least_R).unsqueeze(1), surest_RL, over_RL)


def _cut(tokens: Tensor, ends: Tensor) -> Tensor:
    found = torch.isin(tokens, ends).nonzero().flatten()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


def _require_room(session: Session, prompts: Sequence[Tensor], decoding: Decoding) -> None:
    L = decoding.block
    if (session.rows, session.block) != (len(prompts), L):
        raise CarpoolError(
            f"the session holds {session.rows} sequences in blocks of {session.block}, not {len(prompts)} in blocks of "
            f"{L}; make it of the same prompts and block size"
        )
    limit = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    positions = -(-(longest + decoding.max_new) // L) * L
    if limit is not None and positions > limit:
        raise CarpoolError(
            f"a prompt of {longest} tokens and {decoding.max_new} new ones take {positions} positions in blocks of "
            f"{L}; the model has {limit}"
        )
