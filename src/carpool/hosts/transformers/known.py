"""What a decoding loop knows of its rows, and the arguments of a forward do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from carpool.errors import CarpoolError


@dataclass(frozen=True, eq=False)
class Known:
    """Of the `B` sequences of a forward. The loops of `generate` are asked; a loop of your own sets `run.known`.

    Attributes:
        finished: bool `[B]`, sequences that are computed on although they have ended; they have no vote. False: there
            are none. None: nobody knows.
        prefill: whether rows are of a prompt; bool `[B]` for each sequence; a number: so many of the first tokens of
            each sequence in this forward are. None: several tokens of a sequence, or its first, are a prompt.
        prompt: int64 `[B]`, the same for samples of one prompt and for these alone; a number: so many sequences in a
            row are. None: nobody knows.
    """

    finished: Tensor | bool | None = None
    prefill: Tensor | bool | int | None = None
    prompt: Tensor | int | None = None

    def finished_B(self, B: int, device: torch.device) -> Tensor | None:
        """None where none has ended, or nobody knows."""
        if self.finished is None or self.finished is False:
            return None
        if self.finished is True:
            return torch.ones(B, dtype=torch.bool, device=device)
        return _of_each("finished", self.finished, B, device).bool()

    def prompt_B(self, B: int, device: torch.device) -> Tensor:
        """The prompt of each sequence, int64 in `[0, B)`.

        Raises:
            CarpoolError: nobody knows.
        """
        row_B = torch.arange(B, device=device)
        if self.prompt is None:
            raise CarpoolError(
                "group='prompt': this forward does not say which rows are samples of one prompt, as `generate` does; "
                "set run.known = Known(prompt=...) in a loop of your own"
            )
        if not isinstance(self.prompt, Tensor):
            return row_B // self.prompt
        key_B = _of_each("prompt", self.prompt, B, device)
        return (key_B.unsqueeze(1) == key_B).to(torch.int8).argmax(1)  # the first row of each prompt

    def prefill_N(self, request_N: Tensor, column_N: Tensor, B: int, otherwise: Tensor | bool) -> Tensor:
        """Which rows are of a prompt.

        Args:
            request_N, column_N: sequence of each row, and its place among the sequence's rows (or positions).
            otherwise: where nobody knows; a tensor has one element.
        """
        prefill = otherwise if self.prefill is None else self.prefill
        if isinstance(prefill, bool):
            return torch.full_like(request_N, prefill, dtype=torch.bool)
        if isinstance(prefill, int):
            return column_N < prefill
        if self.prefill is None:
            return prefill.to(request_N.device).reshape(1).expand(len(request_N))
        given_N = _of_each("prefill", prefill, B, request_N.device)[request_N]
        return given_N if given_N.dtype == torch.bool else column_N < given_N


class Loop(Protocol):
    """A decoding loop that is watched while it runs.

    Attributes:
        drafts: its forwards may leave the model after the first layers, as drafts of the model itself do.
    """

    @property
    def drafts(self) -> bool: ...

    def known(self, kwargs: Mapping[str, Any]) -> Known | None:
        """Of the forward that begins with these arguments; None if this is the caller's own loop."""
        ...


class Generation:
    """One call of `generate`.

    Attributes:
        drafts: for a call of `generate` of the same model.
        custom: the loop is the caller's own.
        rows: of its forwards; one of another number is somebody else's, called from within the loop.
        samples: rows of each prompt (returned sequences, beams).
        tokens: of a prompt.
        beams: the rows are beams; which of them go on is decided anew in each step.
        reading: True: the prompt is being read; False: an assistant is told what was accepted; None: neither.
        verifies: the forwards verify candidates.
        cached: the loop keeps a cache.
        finished_B: rows that have ended.
    """

    def __init__(self, custom: bool, drafts: bool) -> None:
        self.custom, self.drafts = custom, drafts
        self.rows, self.samples, self.tokens, self.beams = 0, 1, 0, False
        self.reading: bool | None = None
        self.cached, self.verifies, self.began = True, False, False
        self.finished_B: Tensor | None = None

    def known(self, kwargs: Mapping[str, Any]) -> Known | None:
        """See `Loop`.

        Raises:
            CarpoolError: a loop without a cache, whose steps compute all earlier tokens again.
        """
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        if self.custom or self.rows not in [len(one) for one in given if isinstance(one, Tensor)]:
            return None
        first, self.began = not self.began, True
        prefill: bool | int | None = self.reading
        if self.verifies:
            prefill = self.tokens if first else False
        elif prefill is None and not self.cached:
            raise CarpoolError(
                "generate(use_cache=False) computes every token again in each step, so that a forward is no decoding "
                "step; use the cache"
            )
        return Known(False if self.finished_B is None else self.finished_B, prefill, self.samples)

    def stopped(self, done_B: Tensor) -> None:
        """After a step: which rows met a stopping criterion."""
        if not self.beams:
            self.finished_B = done_B if self.finished_B is None else self.finished_B | done_B


def _of_each(name: str, given: Tensor, B: int, device: torch.device) -> Tensor:
    if given.shape != (B,):
        raise CarpoolError(f"run.known: {name} has shape {list(given.shape)}, but the forward has {B} sequences")
    return given.to(device)
