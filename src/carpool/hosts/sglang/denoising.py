"""Block diffusion in SGLang (LLaDA2, SDAR): a block of every request is denoised, and the block is the group.

A forward pass over a block that holds no mask token any more (a block of the prompt, or a finished one) writes keys and
values that later blocks and other requests read: it keeps its native routing, so what the cache holds is what stock
SGLang makes of these tokens, whatever policy chose them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.engine.settings import Settings
from carpool.hosts.engine.step_rows import Requests
from carpool.hosts.sglang.arm import around
from carpool.hosts.sglang.follow import MARK
from carpool.routing.cold import TeamCold

ALGORITHM = "carpool_algorithm"  # that denoises a batch, kept on it
CONFIDENCE = "carpool_confidence"  # of the last predictions for a request's block, kept on the request
STEPS = {"LowConfidence": "low_confidence"}  # algorithms that never mask a position again, by their modules


def follow_denoising(cfg: Any, voters: TeamCold | None) -> None:
    """Look at the batches that are denoised, if the server denoises.

    Args:
        cfg: its arguments.
        voters: the user's.

    Raises:
        CarpoolError: voters without anything that they could follow.
    """
    algorithm = cfg.dllm_algorithm
    if voters is not None and algorithm is None:
        raise CarpoolError("voters are named, and this server denoises no blocks; leave out 'voters'")
    if voters is not None and algorithm not in STEPS:
        raise CarpoolError(
            f"voters follow what a step predicted, which is known for {' and '.join(STEPS)}, not for {algorithm}; "
            "leave out 'voters'"
        )
    if algorithm is not None:
        around("sglang.srt.dllm.algorithm.base.DllmAlgorithm.run", _run)
    if voters is not None:
        around(f"sglang.srt.dllm.algorithm.{STEPS[algorithm]}.{algorithm}.step", _stepped)


def _run(
    original: Callable[..., Any], algorithm: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    setattr(forward_batch, ALGORITHM, algorithm)
    return original(algorithm, runner, forward_batch, *args, **kwargs)


def _stepped(
    original: Callable[..., Any], algorithm: Any, forward_batch: Any, full_logits: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around an algorithm's step: what it predicts is the last that is known of a block, until the block is done."""
    done = original(algorithm, forward_batch, full_logits, *args, **kwargs)
    marked = getattr(forward_batch, MARK, [])
    confidence_RL = full_logits.float().softmax(-1).amax(-1).view(-1, algorithm.block_size)
    for (request, _), finished, confidence_L in zip(marked, done, confidence_RL, strict=False):
        setattr(request, CONFIDENCE, None if finished else confidence_L)
    return done


def requests_of(forward_batch: Any, settings: Settings) -> Requests | None:
    """The requests of a batch of blocks; None where it has none.

    Raises:
        CarpoolError: the algorithm that denoises them was not followed, so nobody knows what a mask is.
    """
    marked, algorithm = getattr(forward_batch, MARK, []), getattr(forward_batch, ALGORITHM, None)
    if not marked:
        return None
    if algorithm is None:
        raise CarpoolError("blocks are denoised past SGLang's DllmAlgorithm.run, so no policy can follow them")
    masked_RL = forward_batch.input_ids.view(len(marked), algorithm.block_size) == algorithm.mask_id
    if forward_batch.dllm_prompt_mask is not None:  # a prompt may hold the mask token itself
        masked_RL &= ~forward_batch.dllm_prompt_mask.view_as(masked_RL)
    prefill = ~masked_RL.any(1).cpu().numpy()
    lengths = np.full(len(marked), algorithm.block_size)
    votes = None if settings.voters is None else _votes(settings.voters, masked_RL, marked)
    return Requests(lengths, prefill, [request.sampling_params for request, _ in marked], votes)


def _votes(voters: TeamCold, masked_RL: Tensor, marked: list[tuple[Any, bool]]) -> NDArray[np.bool_]:
    known = [getattr(request, CONFIDENCE, None) for request, _ in marked]
    confidence_RL = torch.stack([torch.zeros(masked_RL.shape[1]) if one is None else one.cpu() for one in known])
    first_R = torch.tensor([one is None for one in known])
    return voters.voters(masked_RL.cpu(), confidence_RL, first_R).flatten().numpy()
