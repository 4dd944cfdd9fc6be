"""Policy files: a plan, its settings per layer, the model it was made for and the statistics it needs.

A policy file is JSON. Both hosts load it; the statistics lie beside it and are named by their sha256.

    {"schema": 1, "policy": "xshare(budget=32) | floor(0.3)",
     "layers": {"0": {"budget": 48}, "5": {"budget": 24, "floor": 0.2}},
     "model": {"fingerprint": "...", "num_layers": 16, "num_experts": 64, "top_k": 8},
     "statistics": {"file": "stats.safetensors", "sha256": "..."},
     "curve": [...]}
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from carpool.artefacts.files import require_file, sha256_file, write_text
from carpool.artefacts.identity import Identity
from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan, parse
from carpool.plans.guards import Floor, Guard
from carpool.policies import Policy

SCHEMA = 1
MAX_BYTES = 16 << 20
MODEL = {
    "fingerprint": "routers", "num_layers": "MoE layers:", "num_experts": "experts:", "top_k": "experts a token:",
}  # fmt: skip
KEYS = {"schema", "policy", "layers", "model", "statistics", "curve"}


@dataclass(frozen=True)
class PolicyFile:
    """What a policy file says.

    Attributes:
        plan: for every layer that has no settings of its own.
        layers: by layer index, parameters of the policy that differ (and `floor`, the floor's tau).
        model: fingerprint, num_layers, num_experts and top_k of the model it was made for; may be empty.
        statistics: path of the statistics file, or None.
        curve: measured points, as whatever made the file wrote them.
        name: of the file that was read, for people; empty for settings that come from elsewhere.
    """

    plan: Plan
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    statistics: Path | None = None
    curve: tuple[Any, ...] = ()
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.plan}" if self.name else str(self.plan)

    @property
    def policy(self) -> Policy:
        """Of the layers without settings of their own."""
        return self.plan.policy

    @property
    def guards(self) -> tuple[Guard, ...]:
        """Of the layers without settings of their own."""
        return self.plan.guards

    @property
    def plans(self) -> list[Plan]:
        """The plan of layers without settings of their own, then those of the layers that have some."""
        return [self.plan, *map(self.plan_for, self.layers)]

    def required_stats(self) -> tuple[str, ...]:
        """Names of the per-layer statistics that any layer's plan needs."""
        return tuple(dict.fromkeys(name for plan in self.plans for name in plan.required_stats()))

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises CarpoolError if any layer's plan is impossible for `E` experts, `K` a token."""
        for plan in self.plans:
            plan.check(num_experts, top_k)

    def plan_for(self, layer: int) -> Plan:
        """The plan of one layer."""
        settings = dict(self.layers.get(layer, {}))
        guards: tuple[Guard, ...] = self.plan.guards
        if "floor" in settings:
            guards = (*(guard for guard in guards if not isinstance(guard, Floor)), Floor(settings.pop("floor")))
        return Plan(replace(self.plan.policy, **settings), guards)

    def check_layers(self, layers: list[int]) -> None:
        """Raises CarpoolError if a layer with settings is none of the model's MoE layers (their indices)."""
        foreign = sorted(set(self.layers) - set(layers))
        if foreign:
            raise CarpoolError(
                f"the policy file sets layer {foreign[0]}, which is no MoE layer of this model "
                f"(they are {min(layers)} to {max(layers)})"
            )

    def check_counts(self, counts: dict[str, int]) -> None:
        """Raises CarpoolError if the file was made for a model with other counts (keys of `MODEL`)."""
        for name, count in counts.items():
            if self.model.get(name, count) != count:
                raise CarpoolError(
                    f"the policy file is of a model with {MODEL[name]} {self.model[name]}, this one has {count}; make "
                    "one for this model"
                )

    def check_model(self, model: Identity) -> None:
        """Raises CarpoolError if the file was made for a model with other counts or another fingerprint."""
        self.check_counts({"num_layers": len(model.layers), "num_experts": model.num_experts, "top_k": model.top_k})
        made_for = self.model.get("fingerprint", model.fingerprint)
        if made_for != model.fingerprint:
            raise CarpoolError(
                f"the policy file is of another model (routers {made_for[:12]}, not {model.fingerprint[:12]}); make "
                "one for this model"
            )

    @classmethod
    def load(cls, path: Path | str) -> PolicyFile:
        """Raises CarpoolError: no such file, not a policy file, a bad setting, or other statistics than it names."""
        path = Path(path)
        content = _read(path)
        unknown = set(content) - KEYS
        if unknown:
            raise CarpoolError(
                f"{path}: unknown key {sorted(unknown)[0]!r}; a policy file has {', '.join(sorted(KEYS))}"
            )
        if type(content.get("schema")) is not int or content["schema"] != SCHEMA:
            raise CarpoolError(
                f"{path}: schema {content.get('schema')!r}, this version of Carpool reads schema {SCHEMA}"
            )
        policy: Any = content.get("policy")
        layers, model = content.get("layers", {}), content.get("model", {})
        if not isinstance(layers, dict) or not isinstance(model, dict):
            raise CarpoolError(f"{path}: 'layers' and 'model' must be objects")
        _check_facts(path, model)
        if not isinstance(content.get("curve", []), list):
            raise CarpoolError(f"{path}: 'curve' must be a list")
        loaded = cls(
            plan=parse(policy),
            layers={_layer_index(path, key): _settings(path, key, value) for key, value in layers.items()},
            model=model,
            statistics=_statistics(path, content.get("statistics")),
            curve=tuple(content.get("curve", ())),
            name=path.name,
        )
        names = {parameter.name for parameter in fields(loaded.plan.policy)} | {"floor"}
        for index, settings in loaded.layers.items():
            for name in settings:
                if name not in names:
                    takes = ", ".join(sorted(names))
                    raise CarpoolError(f"{path}: layer {index} sets {name!r}; {loaded.plan.policy.name} takes {takes}")
            loaded.plan_for(index)  # raises on values that the policy refuses
        return loaded

    def save(self, path: Path | str) -> None:
        """Write the file whole or not at all; the statistics must lie in the same folder."""
        path = Path(path)
        content: dict[str, Any] = {"schema": SCHEMA, "policy": str(self.plan)}
        if self.layers:
            content["layers"] = {str(index): settings for index, settings in sorted(self.layers.items())}
        if self.model:
            content["model"] = self.model
        if self.statistics is not None:
            if self.statistics.resolve().parent != path.resolve().parent:
                raise CarpoolError(f"{self.statistics} is not beside {path}; put both into one folder")
            content["statistics"] = {"file": self.statistics.name, "sha256": sha256_file(self.statistics)}
        if self.curve:
            content["curve"] = list(self.curve)
        write_text(path, json.dumps(content, indent=1) + "\n")


AnyPlan = Plan | PolicyFile  # both have a policy, guards, a check and a text


def plan_or_file(text: str) -> AnyPlan:
    """A policy text, or a policy file where the text names one (it exists, or ends in .json).

    Raises:
        CarpoolError: what `parse` and `PolicyFile.load` raise; a folder.
    """
    named = text.strip()
    # os.path: unlike Path.is_file it says no, and raises nothing, where a text is too long for a path
    if named.endswith(".json") or os.path.isfile(named):  # noqa: PTH113
        return PolicyFile.load(named)
    try:
        return parse(text)
    except CarpoolError:
        if os.path.isdir(named):  # noqa: PTH112
            raise CarpoolError(f"{named} is a folder; name the policy file in it, or write a policy text") from None
        raise


def stats_for(plan: AnyPlan, stats: Any) -> Any:
    """The statistics that a plan is given where several plans run: a policy file that names its own takes no others."""
    return None if isinstance(plan, PolicyFile) and plan.statistics is not None else stats


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "the policy file", most=MAX_BYTES)
    if not isinstance(content, dict):
        raise CarpoolError(f"{path} is not a policy file: it holds no JSON object")
    return content


def _check_facts(path: Path, model: dict[str, Any]) -> None:
    for name, value in model.items():
        if name not in MODEL:
            raise CarpoolError(f"{path}: 'model' has no entry {name!r}; it may have {', '.join(MODEL)}")
        kind, called = (str, "a text") if name == "fingerprint" else (int, "a whole number")
        if type(value) is not kind:
            raise CarpoolError(f"{path}: 'model' has {name} {value!r}; give {called}")


def _layer_index(path: Path, key: str) -> int:
    if not key.isdecimal() or len(key) > 6 or key != str(int(key)):
        raise CarpoolError(f"{path}: {key!r} is no layer index; write it as 0, 1, 2, ...")
    return int(key)


def _settings(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CarpoolError(f"{path}: the settings of layer {key} must be an object of parameters")
    return value


def _statistics(path: Path, entry: Any) -> Path | None:
    if entry is None:
        return None
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise CarpoolError(f"{path}: 'statistics' must name a file in the same folder and its sha256")
    found = path.parent / name
    try:
        require_file(found, "the statistics")
    except CarpoolError as error:
        raise CarpoolError(f"{path} names statistics that are not there: {error}") from None
    if sha256_file(found) != entry.get("sha256"):
        raise CarpoolError(f"{found} is not the file that {path} was made with (sha256 differs); calibrate again")
    return found
