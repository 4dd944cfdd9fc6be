"""What the tensors of a trace can be, and every reason why some are not that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from carpool.artefacts.trace_facts import TraceFacts
from carpool.errors import CarpoolError

PHASES = ("prefill", "decode")  # a row's phase is its place here
CHECKED = 1 << 14  # rows looked at together
SMALL = 256  # experts whose numbers fit into a byte


def integers_for(num_experts: int) -> torch.dtype:
    """What the numbers of so many experts are stored in."""
    return torch.uint8 if num_experts <= SMALL else torch.int16


def check_trace(tensors: Mapping[str, Tensor], facts: TraceFacts) -> None:
    """Raises CarpoolError, in one sentence, unless the tensors are those of a trace (`carpool.artefacts.trace`)."""
    shape = tensors["experts"].shape
    if len(shape) != 3 or 0 in shape:
        raise CarpoolError(f"the experts of a trace have shape [rows, layers, experts a token], not {list(shape)}")
    wanted = {
        "experts": (integers_for(facts.num_experts), shape), "weights": (torch.float16, shape),
        "phase": (torch.uint8, shape[:1]),
    }  # fmt: skip
    for name, tensor in tensors.items():
        dtype, size = wanted.get(name, (torch.int32, shape[:1]))
        if tensor.dtype != dtype or tensor.shape != size:
            raise CarpoolError(
                f"{name} of the trace are {tensor.dtype} of shape {list(tensor.shape)}; {dtype} of shape "
                f"{list(size)} belong there"
            )
    _check_facts(facts, *shape[1:])
    _check_order(tensors, facts)
    weights = tensors.get("weights")
    for first in range(0, shape[0], CHECKED):
        part = slice(first, first + CHECKED)
        own = None if weights is None else weights[part]
        _check_choices(tensors["experts"][part].long(), own, facts.num_experts, first)


def _check_facts(facts: TraceFacts, num_layers: int, top_k: int) -> None:
    if not top_k <= facts.num_experts < 1 << 15:
        raise CarpoolError(
            f"the trace claims {top_k} of {facts.num_experts} experts per token; up to 32767 can be told"
        )
    if len(facts.layers) != num_layers or sorted({*facts.layers}) != [*facts.layers]:
        raise CarpoolError(f"the trace has {num_layers} layers and names them {list(facts.layers)}")


def _check_order(tensors: Mapping[str, Tensor], facts: TraceFacts) -> None:
    for name, tensor in tensors.items():
        if name in ("step", "request", "position") and int(tensor.min()) < 0:
            raise CarpoolError(f"the trace has a negative {name}")
    if bool((tensors["step"].diff() < 0).any()):
        raise CarpoolError("the rows of the trace are not in the order of their steps")
    if int(tensors["phase"].max()) >= len(PHASES):
        raise CarpoolError(f"the trace has a phase {int(tensors['phase'].max())}; they are {', '.join(PHASES)}")
    domains = len(facts.domains)
    if domains and int(tensors["request"].max()) >= domains:
        raise CarpoolError(
            f"the trace has a request {int(tensors['request'].max())} and names the domains of {domains}"
        )


def _check_choices(experts_CLK: Tensor, weights_CLK: Tensor | None, num_experts: int, first: int) -> None:
    """Raises CarpoolError for experts that there are not, or a row that chooses one twice."""
    if int(experts_CLK.min()) < 0 or int(experts_CLK.max()) >= num_experts:
        odd = int(experts_CLK.max() if int(experts_CLK.min()) >= 0 else experts_CLK.min())
        raise CarpoolError(f"the trace names expert {odd} of {num_experts}")
    if weights_CLK is not None:
        if not (weights_CLK.isfinite() & (weights_CLK >= 0)).all():
            raise CarpoolError("the trace has weights that are negative, NaN or infinite")
        own_K = num_experts + torch.arange(experts_CLK.shape[-1])
        experts_CLK = torch.where(weights_CLK == 0, own_K, experts_CLK)
    twice_C = (experts_CLK.sort(-1).values.diff(dim=-1) == 0).flatten(1).any(1)
    if twice_C.any():
        raise CarpoolError(f"row {first + int(twice_C.nonzero()[0])} of the trace chooses an expert twice")
