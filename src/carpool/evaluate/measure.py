"""Measures policies in lockstep: text that decodes under teacher forcing, all batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from carpool.errors import CarpoolError
from carpool.evaluate.details import Details
from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.loop import Loop, MoE, sequences_per_pass
from carpool.evaluate.measured import Measured
from carpool.evaluate.sequences import Sequences
from carpool.plans.policy_file import AnyPlan


def measure(
    model: Any,
    moe: MoE,
    plans: Sequence[AnyPlan],
    sequences: Sequences,
    layout: Layout,
    batches: int,
    *,
    stats: Any = None,
    allow_unchanged: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Measured]:
    """Stock first, then every plan, over the first `batches * B` sequences.

    Args:
        advance: told the rows of every pass that is done.

    Raises:
        CarpoolError: what `Loop.run` raises; fewer sequences than needed.
    """
    loop = Loop(model, moe, layout, parts(model, sequences, layout, batches), sequences.domains, stats=stats)
    details = [Details.empty(len(sequences.domains), moe.layers, moe.experts) for _ in (None, *plans)]
    found = loop.run(
        plans, watchers=details, allow_unchanged=allow_unchanged,
        advance=lambda count: advance(count * layout.positions),
    )  # fmt: skip
    return [replace(one, details=seen) for one, seen in zip(found, details, strict=True)]


def parts(model: Any, sequences: Sequences, layout: Layout, batches: int) -> list[Part]:
    """The passes of lockstep evaluation over the first `batches * B` sequences.

    Raises:
        CarpoolError: fewer sequences than that.
    """
    needed, size = require_enough(sequences, layout, batches), sequences_per_pass(model, layout)
    pairs = zip(sequences.ids_ST[:needed].split(size), sequences.domain_S[:needed].split(size), strict=True)
    return [Part(ids_ST[:, :-1], ids_ST[:, layout.prefill + 1 :], domain_S) for ids_ST, domain_S in pairs]


def require_enough(sequences: Sequences, layout: Layout, batches: int) -> int:
    """How many sequences the batches need; raises CarpoolError if there are fewer."""
    needed, given = batches * layout.batch_size, len(sequences.ids_ST)
    if needed > given:
        raise CarpoolError(f"{batches} batches of {layout.batch_size} need {needed} sequences, not {given}")
    return needed
