"""Placements as files: JSON that says which model and which trace they were made for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carpool.artefacts.files import write_text
from carpool.artefacts.identity import Identity
from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.placement.placement import Placement

SCHEMA = 1
WORDS = ("method", "objective", "status")
MADE = "`carpool place --trace FILE -o placement.json`"


@dataclass(frozen=True, eq=False)
class PlacementFile:
    """A placement and the model that it is for.

    Attributes:
        layers: numbers of the placement's layers in the model. fingerprint: of its routers; empty: not known.
        trace: sha256 of the trace that it was planned on.
    """

    placement: Placement
    layers: tuple[int, ...]
    fingerprint: str = ""
    trace: str = ""

    def __post_init__(self) -> None:
        if len(self.layers) != self.placement.layers or sorted({*self.layers}) != [*self.layers]:
            raise CarpoolError(f"a placement of {self.placement.layers} layers names them {list(self.layers)}")

    def check(self, model: Identity) -> None:
        """Raises CarpoolError unless the placement is for this model."""
        mine, theirs = (self.layers, self.placement.num_experts), (model.layers, model.num_experts)
        if mine != theirs or self.fingerprint not in ("", model.fingerprint):
            raise CarpoolError(
                f"the placement is for another model ({len(mine[0])} layers of {mine[1]} experts, routers "
                f"{self.fingerprint[:12] or 'unknown'}; this one has {len(theirs[0])} of {theirs[1]}, routers "
                f"{model.fingerprint[:12]}): plan again from a trace of it: {MADE}"
            )

    def save(self, path: str | Path) -> None:
        """Write the file; an older one stays until the new one is complete.

        Raises:
            CarpoolError: the file cannot be written.
        """
        placement = self.placement
        about: dict[str, Any] = {
            "carpool_placement": SCHEMA, "fingerprint": self.fingerprint, "trace": self.trace,
            "layers": list(self.layers), "num_experts": placement.num_experts, "nodes": placement.nodes,
            **{name: getattr(placement, name) for name in (*WORDS, "value", "bound", "seed")},
        }  # fmt: skip
        rows = ",\n  ".join(json.dumps(one) for one in placement.expert_LDS.tolist())
        write_text(path, f'{json.dumps(about)[:-1]},\n "experts": [\n  {rows}\n ]}}\n')

    @classmethod
    def load(cls, path: str | Path) -> PlacementFile:
        """Read and check a file.

        Raises:
            CarpoolError: it is missing, no JSON, of another schema, or no placement.
        """
        found = read_json(Path(path))
        if not isinstance(found, dict) or "carpool_placement" not in found:
            raise CarpoolError(f"{path} is no placement of carpool; make one with {MADE}")
        if found["carpool_placement"] != SCHEMA:
            raise CarpoolError(f"{path} has schema {found['carpool_placement']!r}, this version reads {SCHEMA}: {MADE}")
        kinds = {
            **dict.fromkeys((*WORDS, "fingerprint", "trace"), str), "num_experts": int, "nodes": int, "layers": list,
            "experts": list,
        }  # fmt: skip
        for name, kind in kinds.items():
            if type(found.get(name)) is not kind:
                raise CarpoolError(f"{path}: {name!r} is missing or of another type; plan again: {MADE}")
        try:
            expert_LDS = torch.tensor(found["experts"])
        except (TypeError, ValueError):
            raise CarpoolError(
                f"{path}: 'experts' are not numbers by layer, device and slot; plan again: {MADE}"
            ) from None
        try:
            placement = Placement(
                expert_LDS, found["num_experts"], found["nodes"], **{name: found[name] for name in WORDS},
                value=float(found.get("value") or 0), bound=found.get("bound"), seed=found.get("seed"),
            )  # fmt: skip
            return cls(placement, tuple(found["layers"]), found["fingerprint"], found["trace"])
        except CarpoolError as error:
            raise CarpoolError(f"{path}: {error}") from None
