"""What a user may write under the key `carpool` of vLLM's `additional_config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carpool.batch import Grouping
from carpool.errors import CarpoolError
from carpool.grammar import Plan, parse
from carpool.policy_file import PolicyFile

KEY = "carpool"
EXAMPLE = '{"carpool": {"policy": "xshare(budget=32)"}}'
TYPES: dict[str, type] = {"policy": str, "file": str, "stats": str, "group": str, "allow_untested_engine": bool}
GROUPINGS = ("batch", "request")


@dataclass(frozen=True)
class Settings:
    """The plugin's configuration.

    Attributes:
        policies: plan of every layer, and the statistics file where a policy needs one.
        group: rows that share a coreset, `batch` or `request`.
        allow_untested_engine: go on with a version of vLLM that was not tested.
    """

    policies: PolicyFile
    group: Grouping
    allow_untested_engine: bool = False

    def plan_for(self, layer: int) -> Plan:
        """The plan of one layer with the defaults of serving."""
        return self.policies.plan_for(layer).for_serving()

    @classmethod
    def of(cls, additional_config: Any) -> Settings | None:
        """The settings, or None if the configuration has no key `carpool`.

        Raises:
            CarpoolError: unknown keys, wrong types, neither or both of `policy` and `file`, a policy that cannot be
                read, a file that cannot be read, a grouping that an engine does not have.
        """
        if not isinstance(additional_config, dict) or KEY not in additional_config:
            return None
        given = additional_config[KEY]
        if not isinstance(given, dict):
            raise CarpoolError(f"additional_config['{KEY}'] is {given!r}; give an object such as {EXAMPLE}")
        for name, value in given.items():
            if name not in TYPES:
                raise CarpoolError(f"additional_config['{KEY}'] has no key {name!r}; it takes: {', '.join(TYPES)}")
            if type(value) is not TYPES[name]:
                raise CarpoolError(f"{KEY}: {name} is {value!r}; give a {TYPES[name].__name__}")
        if ("policy" in given) == ("file" in given):
            raise CarpoolError(f"{KEY}: give either 'policy' or 'file', as in {EXAMPLE}")
        return cls(_policies(given), _grouping(given), given.get("allow_untested_engine", False))


def _policies(given: dict[str, Any]) -> PolicyFile:
    if "policy" in given:
        statistics = Path(given["stats"]) if "stats" in given else None
        return PolicyFile(parse(given["policy"]), statistics=statistics)
    if "stats" in given:
        raise CarpoolError(f"{KEY}: a policy file names its own statistics; leave out 'stats'")
    return PolicyFile.load(given["file"])


def _grouping(given: dict[str, Any]) -> Grouping:
    group = Grouping.parse(given.get("group", "batch"))
    if group.kind not in GROUPINGS:
        raise CarpoolError(f"{KEY}: group={str(group)!r} is no grouping of an engine; use {' or '.join(GROUPINGS)}")
    return group
