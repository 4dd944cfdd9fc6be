"""Measures policies in lockstep: text that decodes under teacher forcing, all batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
    devices: int | None = None,
    allow_unchanged: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Measured]:
    """Stock first, then every plan, over the first `batches * B` sequences.

    Args:
        devices: that experts lie on in order, for policies with a budget per device; None: on one.
        advance: told the rows of every pass that is done.

    Raises:
        CarpoolError: what `Loop.run` raises; fewer sequences than needed.
    """
    device_E = None if devices is None else in_order(moe.experts, devices)
    passes = parts(model, sequences, layout, batches)
    loop = Loop(model, moe, layout, passes, sequences.domains, stats=stats, device_E=device_E)
    details = [Details.empty(len(sequences.domains), moe.layers, moe.experts) for _ in (None, *plans)]
    found = loop.run(
        plans, watchers=details, allow_unchanged=allow_unchanged,
        advance=lambda count: advance(count * layout.positions),
    )  # fmt: skip
    return [replace(one, details=seen) for one, seen in zip(found, details, strict=True)]


def in_order(experts: int, devices: int) -> Tensor:
    """Int64 `[E]`: the device of each expert if devices hold equally many, in order; raises CarpoolError if they
    cannot."""
    if devices < 1 or experts % devices:
        raise CarpoolError(f"--devices {devices}: {experts} experts do not divide evenly among so many")
    return torch.arange(experts) // (experts // devices)


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
