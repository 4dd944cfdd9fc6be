"""What a user may write under the key `carpool` of an engine's own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan, parse
from carpool.plans.policy_file import PolicyFile
from carpool.policies import Policy
from carpool.routing.batch import Grouping
from carpool.routing.cold import TeamCold

KEY = "carpool"
EXAMPLE = '{"carpool": {"policy": "xshare(budget=32)", "isolation": "batch"}}'
TYPES: dict[str, type] = {
    "policy": str, "file": str, "stats": str, "group": str, "isolation": str, "allow_untested_engine": bool,
    "compile": bool,
}  # fmt: skip
GROUPINGS = ("request", "prompt", "tenant", "batch")  # from narrow to wide; as isolation: the widest that is allowed
ISOLATION = "prompt"  # the widest that needs nobody else's consent


def configured(given: Any) -> bool:
    """Whether there is a key `carpool`."""
    return isinstance(given, dict) and KEY in given


@dataclass(frozen=True)
class Settings:
    """The plugin's configuration.

    Attributes:
        policies: plan of every layer, and the statistics file where a policy needs one.
        group: rows that share a coreset, one of `GROUPINGS`.
        isolation: the widest grouping in which requests may depend on each other.
        allow_untested_engine: go on with a version of the engine that was not tested.
        compile: run routing as a compiled graph; None leaves it to the host; False also leaves out kernels on GPUs.
        voters: who has a say where blocks are denoised; None: everybody.
    """

    policies: PolicyFile
    group: Grouping
    isolation: str = ISOLATION
    allow_untested_engine: bool = False
    compile: bool | None = None
    voters: TeamCold | None = None

    def plan_for(self, layer: int) -> Plan:
        """The plan of one layer with the defaults of serving."""
        return self.policies.plan_for(layer).for_serving()

    def require_isolation(self, policy: Policy) -> None:
        """Raises CarpoolError if a group-wide policy would let requests depend on each other further than allowed."""
        group = self.group.kind
        if policy.kind == "token" or GROUPINGS.index(group) <= GROUPINGS.index(self.isolation):
            return
        whose = {
            "batch": "all requests of a batch", "tenant": "a tenant's requests", "prompt": "a prompt's samples",
        }[group]  # fmt: skip
        narrower = ', or "group": "prompt" to share among the samples of one request only' if group == "batch" else ""
        raise CarpoolError(
            f"{policy} with group={group!r} lets the rows of {whose} choose experts for each other, so what one "
            f'receives depends on the others: write "isolation": "{group}" to accept that{narrower}, or use a '
            "token-local policy"
        )

    @classmethod
    def of(
        cls, found: Any, where: str = "additional_config", takes: Mapping[str, type] = TYPES, group: str | None = None
    ) -> Settings | None:
        """The settings, or None if there is no key `carpool`.

        Args:
            found: the engine's object.
            where: the user writes it.
            takes: keys and their types.
            group: where the user names none; None: as wide as the isolation.

        Raises:
            CarpoolError: unknown keys, wrong types, neither or both of `policy` and `file`, a policy that cannot be
                read, a file that cannot be read, a grouping that an engine does not have or that is wider than
                the isolation.
        """
        if not configured(found):
            return None
        given = found[KEY]
        if not isinstance(given, dict):
            raise CarpoolError(f"{where}['{KEY}'] is {given!r}; give an object such as {EXAMPLE}")
        for name, value in given.items():
            if name not in takes:
                raise CarpoolError(f"{where}['{KEY}'] has no key {name!r}; it takes: {', '.join(takes)}")
            if type(value) is not takes[name]:
                raise CarpoolError(f"{KEY}: {name} is {value!r}; give a {takes[name].__name__}")
        if ("policy" in given) == ("file" in given):
            raise CarpoolError(f"{KEY}: give either 'policy' or 'file', as in {EXAMPLE}")
        policies, isolation = _policies(given), _isolation(given)
        voters = TeamCold.parse(given["voters"]) if "voters" in given else None
        untested = given.get("allow_untested_engine", False)
        settings = cls(policies, _grouping(given, group), isolation, untested, given.get("compile"), voters)
        settings.require_isolation(policies.plan.policy)
        return settings


def _policies(given: dict[str, Any]) -> PolicyFile:
    if "policy" in given:
        statistics = Path(given["stats"]) if "stats" in given else None
        return PolicyFile(policy_of(given["policy"]), statistics=statistics)
    if "stats" in given:
        raise CarpoolError(f"{KEY}: a policy file names its own statistics; leave out 'stats'")
    return PolicyFile.load(given["file"])


def _isolation(given: dict[str, Any]) -> str:
    isolation: str = given.get("isolation", ISOLATION)
    if isolation not in GROUPINGS:
        raise CarpoolError(f"{KEY}: isolation={isolation!r}; use one of {', '.join(GROUPINGS)}")
    return isolation


def _grouping(given: dict[str, Any], group: str | None) -> Grouping:
    # without a word about either, the methods' own grouping, so that it is refused and not silently inert
    return grouping(given.get("group", group or given.get("isolation", "batch")))


def policy_of(text: str) -> Plan:
    """Raises CarpoolError for a text that is no policy, such as the name of a policy file."""
    if text.strip().endswith(".json"):
        raise CarpoolError(f"{KEY}: policy={text!r} names a file; give it as 'file' instead")
    return parse(text)


def grouping(text: str) -> Grouping:
    """Raises CarpoolError for a text that is no grouping of an engine."""
    if text not in GROUPINGS:
        raise CarpoolError(f"{KEY}: group={text!r}; use one of {', '.join(GROUPINGS)}")
    return Grouping.parse(text)
