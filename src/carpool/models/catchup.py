"""What each expert has read of each text: a newly chosen one first reads what was written while others were chosen.

A cache with a hole would be wrong without a sign of it. Every pair of expert and text has a cache of its own, so an
expert reads exactly the tokens that it lacks, without padding, and its logits are those of reading the text at once.

Shapes: `B` texts, `V` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError


@dataclass
class Reading:
    """A text as one expert has read it.

    Attributes:
        ids: tokens that are in its cache. cache: transformers' own, None before the first token.
    """

    ids: list[int]
    cache: Any = None


class CatchUp:
    """Caches of one expert over the texts of a batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.readings: dict[int, Reading] = {}

    def unread(self, row: int, length: int) -> int:
        """Tokens of a text of this length that it has not read."""
        reading = self.readings.get(row)
        return length - (0 if reading is None else len(reading.ids))

    @torch.inference_mode()
    def logits(self, row: int, ids: Sequence[int]) -> Tensor:
        """Logits `[V]` for the token after a text, reading what is new of it.

        Raises:
            CarpoolError: the text is not the one it has read so far; rows of a batch must keep their places.
        """
        reading = self.readings.setdefault(row, Reading([]))
        known = len(reading.ids)
        if known >= len(ids) or list(ids[:known]) != reading.ids:
            raise CarpoolError(
                f"text {row} is not the one that was read before: rows must keep their places (no beams, no assisted "
                "decoding), and only grow"
            )
        new = list(ids[known:])
        made = self.model(
            input_ids=torch.tensor([new], device=self.model.device), past_key_values=reading.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        reading.ids, reading.cache = list(ids), made.past_key_values
        return made.logits[0, -1]

    def forget(self) -> None:
        """Begin with other texts."""
        self.readings.clear()
