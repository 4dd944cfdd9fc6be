"""What a trace says of itself: the model, the text and the versions that it comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from carpool.artefacts.json_text import parse_json
from carpool.errors import CarpoolError

MADE = "`carpool trace MODEL --text FILE -o trace.safetensors`"


@dataclass(frozen=True)
class TraceFacts:
    """What a trace says of itself.

    Attributes:
        num_experts: `E`, the same in every layer.
        layers: numbers of the MoE layers in the model, in order.
        hidden_size: numbers of a token's hidden state; 0: not known.
        expert_bytes: bytes of one expert's weights as the checkpoint stores them, the mean over layers; 0: not known.
        fingerprint: of the model's routers (`carpool.artefacts.identity.fingerprint`); empty: not known.
        architecture: name of the model's class, or of where an imported trace comes from.
        created: date and time, ISO 8601, UTC.
        versions: `(name, version)` of what recorded it.
        data: `(file name, sha256)` of every text file.
        domains: of every request, in the order of their numbers; empty: not known.
        seed: of the choice of text.
    """

    num_experts: int
    layers: tuple[int, ...]
    hidden_size: int = 0
    expert_bytes: int = 0
    fingerprint: str = ""
    architecture: str = ""
    created: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    domains: tuple[str, ...] = ()
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """By the names of the attributes."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def parse(cls, text: str) -> TraceFacts:
        """Raises CarpoolError unless the text holds what `as_json` gives."""
        found = parse_json(text, "what the trace says of itself")
        found = found if isinstance(found, dict) else {}
        known = {one.name: one for one in fields(cls)}
        if set(found) != set(known):
            odd = sorted(set(found) ^ set(known))[0]
            raise CarpoolError(f"the entry {odd!r} is missing or unknown; record the trace again: {MADE}")
        kinds = {"int": int, "str": str}
        for name, value in found.items():
            kind = kinds.get(str(known[name].type), list)
            if type(value) is not kind:
                raise CarpoolError(f"the entry {name!r} is {value!r}, not of type {known[name].type}")
        pairs = {name: tuple(map(_pair, found[name])) for name in ("versions", "data")}
        if not all(type(one) is int for one in found["layers"]) or not all(
            type(one) is str for one in found["domains"]
        ):
            raise CarpoolError("the entries 'layers' and 'domains' must list numbers and names")
        return cls(**{**found, **pairs, "layers": tuple(found["layers"]), "domains": tuple(found["domains"])})


def _pair(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, list) or list(map(type, entry)) != [str, str]:
        raise CarpoolError("the entries 'versions' and 'data' must list pairs of words")
    return entry[0], entry[1]
