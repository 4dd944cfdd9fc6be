"""Families of plans with one number to choose: the larger it is, the closer the plan stays to the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan, parse
from carpool.policies.registry import policies, policy_class

KNOBS = ("bytes", "budget", "size", "k0", "top", "k")
LEAST_BYTES = 8  # hundredths of stock's bytes; below, no depth is worth looking at
SHARED_BITS = 4  # beyond, quantised experts lose so little that sharing them costs more than fewer bits
QUARTER = 4  # steps of a bit, in a plan of bits
DEFAULT = ("depth", "surrogate", "base", "xshare(budget=1, utility='squared')", "xshare", "des_vote", "lynx")


@dataclass(frozen=True)
class Family:
    """A plan whose knob is free.

    Attributes:
        plan: with any value of the knob. knob: the parameter that is searched.
        least, most: smallest and largest share of bytes, in hundredths, as far as statistics say.
        ladder: in place of a knob, the plans to choose from, from the one that reads least; `title` is its name then.
    """

    plan: Plan
    knob: str
    least: int = LEAST_BYTES
    most: int | None = None
    ladder: tuple[Plan, ...] = ()
    title: str = ""

    def at(self, value: int) -> Plan:
        """The plan with a value of its knob."""
        if self.ladder:
            return self.ladder[value]
        given = value / 100 if self.knob == "bytes" else value
        return Plan(replace(self.plan.policy, **{self.knob: given}), self.plan.guards)

    @property
    def name(self) -> str:
        """The plan without its knob."""
        if self.ladder:
            return self.title
        given = f"{self.knob}={getattr(self.plan.policy, self.knob)!r}"
        return str(self.plan).replace(f"({given})", "").replace(f"{given}, ", "").replace(f", {given}", "")

    def values(self, num_experts: int, top_k: int) -> list[int]:
        """Values that the policy accepts for `E` experts, `K` a token, ascending."""
        if self.ladder:
            return list(range(len(self.ladder)))
        if self.knob == "bytes":
            return list(range(self.least, (self.most or 0) + 1))
        found = []
        for value in range(1, num_experts + 1):
            try:
                self.at(value).check(num_experts, top_k)
            except CarpoolError:
                continue
            found.append(value)
        return found

    @property
    def required_stats(self) -> tuple[str, ...]:
        return self.plan.required_stats()


def uniform(bits: int, top_k: int) -> Plan:
    """All experts of a model with `K` a token at one number of bits, and no sharing."""
    return parse(f"topk(k={top_k}) | bits({bits})")


def on_planes(depths: Sequence[int], top_k: int) -> list[Family]:
    """What to search beside `depth` where experts are stored at these depths, ascending: quantisation alone, `depth`
    that leaves nothing out, MC's plan by lost energy (it loses less than with MC's own powers wherever we measured
    both), HOBBIT's rule, and sharing."""
    steps = range(QUARTER * depths[0], QUARTER * depths[-1] + 1)
    plans = [parse(f"bit_plan(bits={step / QUARTER}, alpha=0, beta=0)") for step in steps]
    pairs = [(high, low) for place, high in enumerate(depths) for low in depths[max(place - 2, 0) : place]]
    rules = [parse(f"hobbit({high}, {low}, second=1.0)") for high, low in pairs]
    found = [_ladder(f"topk(k={top_k}) | bits", [uniform(depth, top_k) for depth in depths])]
    if len(depths) > 1:
        found.append(family(f"depth(bytes=0.25, levels={list(depths)})"))
        found += [_ladder("bit_plan, by lost energy", plans), _ladder("hobbit", rules)]
    inner = [depth for depth in depths[1:] if depth <= SHARED_BITS]
    return found + [family(f"xshare(budget=1, utility='squared') | bits({depth})") for depth in inner]


def _ladder(title: str, plans: Sequence[Plan]) -> Family:
    return Family(plans[0], "", ladder=tuple(plans), title=title)


def measurable(families: Sequence[Family], statistics: Collection[str]) -> list[Family]:
    """The families that need no other statistics than these; not all files hold what every method needs."""
    return [one for one in families if set(one.required_stats) <= set(statistics)]


def bounded(families: Sequence[Family], statistics: Mapping[str, Tensor]) -> list[Family]:
    """The families, with the fewest and the most bytes that a layer can be read with where these are searched."""
    found = []
    for one in families:
        if one.knob == "bytes" and "depth_bytes" in statistics:
            size_L, use_SE = statistics["depth_bytes"], statistics["depth_use"][0]
            least = float(size_L.min())
            if 0 in (getattr(one.plan.policy, "levels", None) or (0,)):
                least /= int((use_SE > 0).sum(-1).min())  # of a lone row: one expert of its own
            one = replace(one, least=max(LEAST_BYTES, int(100 * least) + 1), most=int(100 * float(size_L.max())))
        found.append(one)
    return found


def family(text: str) -> Family:
    """The family of a policy's name, or of a plan whose number stands for all numbers: `xshare | floor(0.3)`.

    Raises:
        CarpoolError: not a policy, or one without a number to choose.
    """
    name, bar, guards = text.partition("|")
    bare = name.strip()
    if bare in policies():
        names = [parameter.name for parameter in fields(policy_class(bare))]
        given = next((knob for knob in KNOBS if knob in names), None)
        if given is None:
            raise CarpoolError(f"{bare} has no number to tune; it takes {', '.join(names) or 'no parameters'}")
        text = f"{bare}({given}={0.25 if given == 'bytes' else 1}) {bar}{guards}"
    plan = parse(text)
    names = [parameter.name for parameter in fields(plan.policy)]
    knobs = [knob for knob in KNOBS if knob in names and getattr(plan.policy, knob) is not None]
    if not knobs:
        raise CarpoolError(f"{plan} has no number to tune; tune one of {', '.join(KNOBS)}")
    return Family(plan, knobs[0])
