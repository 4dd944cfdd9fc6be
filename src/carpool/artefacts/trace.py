"""A trace: which experts every token chose, step by step. Nobody's text is in it.

`T` rows (a token in one forward each), `L` MoE layers, `K` experts per token, `E` experts. See `docs/traces.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.files import read_safetensors
from carpool.artefacts.growing import GrowingFile, digests_of
from carpool.artefacts.identity import Identity
from carpool.artefacts.trace_checks import PHASES, check_trace, integers_for
from carpool.artefacts.trace_facts import MADE, TraceFacts
from carpool.errors import CarpoolError

KEY, SCHEMA = "carpool_trace", "1"
LEAST = 2.0**-24  # above 0 in float16


@dataclass(frozen=True, eq=False)
class Trace:
    """Who chose whom; an instance is always valid.

    Rows are in the order of steps. The rows of a step ran in one forward: what they chose together is what it read.

    Attributes:
        experts_TLK: uint8 where there are up to 256 experts, else int16; best first. A slot of weight 0 is free: it
            repeats an expert of its row.
        weights_TLK: float16, as the model mixes by; None: not known.
        step_T, request_T, position_T: int32: the forward, the sequence, and the token's place in it.
        phase_T: uint8, place in `PHASES`.
        facts: where it comes from.

    Raises:
        CarpoolError: on construction, if anything above does not hold.
    """

    experts_TLK: Tensor
    weights_TLK: Tensor | None
    step_T: Tensor
    request_T: Tensor
    position_T: Tensor
    phase_T: Tensor
    facts: TraceFacts

    def __post_init__(self) -> None:
        check_trace(self.tensors(), self.facts)

    @classmethod
    def of(
        cls,
        experts_TLK: Tensor,
        facts: TraceFacts,
        *,
        step_T: Tensor,
        weights_TLK: Tensor | None = None,
        request_T: Tensor | None = None,
        position_T: Tensor | None = None,
        decode_T: Tensor | None = None,
    ) -> Trace:
        """A trace from tensors of any integer kind, as an import has them.

        Args:
            experts_TLK, weights_TLK, step_T: as of the class.
            request_T, position_T: default: a request of its own for every row, all at position 0.
            decode_T: bool, which rows were decoded; default: all.

        Raises:
            CarpoolError: see the class.
        """
        zeros_T = torch.zeros(len(experts_TLK), dtype=torch.int32)
        if experts_TLK.numel() and not 0 <= int(experts_TLK.min()) <= int(experts_TLK.max()) < facts.num_experts:
            raise CarpoolError(
                f"the trace names experts {int(experts_TLK.min())} to {int(experts_TLK.max())} of {facts.num_experts}"
            )
        return cls(
            experts_TLK.to(integers_for(facts.num_experts)),
            None if weights_TLK is None else _halves(weights_TLK),
            step_T.int(),
            torch.arange(len(zeros_T), dtype=torch.int32) if request_T is None else request_T.int(),
            zeros_T if position_T is None else position_T.int(),
            (zeros_T + 1 if decode_T is None else decode_T).to(torch.uint8),
            facts,
        )

    def __len__(self) -> int:
        """Rows."""
        return len(self.experts_TLK)

    @property
    def num_experts(self) -> int:
        return self.facts.num_experts

    @property
    def num_layers(self) -> int:
        return self.experts_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts_TLK.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in a file."""
        held = {
            "experts": self.experts_TLK, "weights": self.weights_TLK, "step": self.step_T, "request": self.request_T,
            "position": self.position_T, "phase": self.phase_T,
        }  # fmt: skip
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def steps(self) -> Iterator[slice]:
        """The rows of every step, in order."""
        first = 0
        for count in torch.unique_consecutive(self.step_T, return_counts=True)[1].tolist():
            yield slice(first, first + count)
            first += count

    def select(self, rows: slice | Tensor) -> Trace:
        """The trace of some rows, which stay in order: a slice, or a bool mask.

        Raises:
            CarpoolError: no row is left.
        """
        taken: dict[str, Any] = {
            f"{name}_T{'LK' if one.dim() == 3 else ''}": one[rows] for name, one in self.tensors().items()
        }
        if not len(taken["step_T"]):
            raise CarpoolError("no row of the trace is left: record more, or select otherwise")
        return replace(self, **taken)

    def of_phase(self, phase: str) -> Trace:
        """The rows of one of `PHASES`; raises CarpoolError where there are none."""
        wanted_T = self.phase_T == PHASES.index(phase)
        if not wanted_T.any():
            raise CarpoolError(f"the trace has no row of phase {phase}: record one that has (--prefill, --sequence)")
        return self.select(wanted_T)

    def windows(self, count: int) -> list[Trace]:
        """Consecutive parts with as many steps each, one more in the first of them where that does not come out even.

        Raises:
            CarpoolError: fewer steps than parts.
        """
        steps = list(self.steps())
        if not 1 <= count <= len(steps):
            raise CarpoolError(f"a trace of {len(steps)} steps does not split into {count} windows: record more")
        ends = [len(steps) * place // count for place in range(count + 1)]
        return [self.select(slice(steps[begin].start, steps[end - 1].stop)) for begin, end in pairwise(ends)]

    def check(self, model: Identity) -> None:
        """Raises CarpoolError unless the trace is of this model."""
        mine = (self.facts.layers, self.num_experts, self.top_k)
        theirs = (model.layers, model.num_experts, model.top_k)
        if mine != theirs or self.facts.fingerprint not in ("", model.fingerprint):
            raise CarpoolError(
                f"the trace is of another model ({self.facts.architecture or 'unnamed'}, {len(mine[0])} layers, "
                f"{mine[2]} of {mine[1]} experts, routers {self.facts.fingerprint[:12] or 'unknown'}; this one has "
                f"{len(theirs[0])} layers, {theirs[2]} of {theirs[1]} experts, routers {model.fingerprint[:12]}): "
                f"record it again: {MADE}"
            )

    def save(self, path: str | Path) -> None:
        """Write the file; an older one stays until the new one is complete. `TraceWriter` writes what memory does not
        hold.

        Raises:
            CarpoolError: the file cannot be written.
        """
        with GrowingFile(path) as file:
            file.append(self.tensors())
            file.metadata = trace_metadata(self.facts, file.digests)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read and check a file.

        Raises:
            CarpoolError: it is missing, no safetensors file, damaged, of another schema, or no trace.
        """
        tensors, metadata = read_safetensors(path)
        if KEY not in metadata:
            raise CarpoolError(f"{path} is no trace of carpool; make one with {MADE}")
        if metadata[KEY] != SCHEMA:
            raise CarpoolError(f"{path} has schema {metadata[KEY]!r}, this version reads {SCHEMA}: {MADE}")
        held = {name: f"{name}_TLK" if name in ("experts", "weights") else f"{name}_T" for name in tensors}
        try:
            if set(held.values()) | {"weights_TLK"} != {f.name for f in fields(cls)} - {"facts"}:
                raise CarpoolError(f"its tensors are {', '.join(sorted(tensors))}, not those of a trace")
            named: dict[str, Any] = {held[name]: tensor for name, tensor in tensors.items()}
            trace = cls(**({"weights_TLK": None} | named), facts=TraceFacts.parse(metadata.get("facts", "")))
        except CarpoolError as error:
            raise CarpoolError(f"{path}: {error}") from None
        if metadata != trace_metadata(trace.facts, digests_of(tensors)):
            raise CarpoolError(f"{path} is damaged: its checksum differs; record it again or fetch the file anew")
        return trace


def _halves(weights: Tensor) -> Tensor:
    """In float16, where a weight stays above 0, which would say that its slot is free."""
    return torch.where(weights > 0, weights.clamp_min(LEAST), weights).to(torch.float16)


def trace_metadata(facts: TraceFacts, digests: Mapping[str, str]) -> dict[str, str]:
    """Of a file of these facts and tensors, whose hex sha256 are given by name."""
    about = json.dumps(facts.as_json())
    content = json.dumps([about, sorted(digests.items())])
    return {KEY: SCHEMA, "facts": about, "checksum": hashlib.sha256(content.encode()).hexdigest()}
