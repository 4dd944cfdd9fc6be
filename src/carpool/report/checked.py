"""What a report reads from a file of results is there and makes sense, or one sentence says what does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from carpool.errors import CarpoolError

MOST = 1e12  # no metric is larger
ROUNDING = 1e-6
Limits = tuple[float, float]
AMOUNT: Limits = (0.0, MOST)
SHARE: Limits = (0.0, 1.0 + ROUNDING)
METRICS: dict[str, Limits] = {
    "union": AMOUNT, "union_share": AMOUNT, "bytes_share": AMOUNT, "pairs": AMOUNT, "perplexity_ratio": AMOUNT,
    "displaced_mass": SHARE, "top1_agreement": SHARE,
    "kl": (-ROUNDING, MOST),
}  # fmt: skip
DECODED: dict[str, Limits] = {
    "union": AMOUNT, "union_share": AMOUNT, "tokens_per_forward": AMOUNT, "agreement": SHARE,
}  # fmt: skip
DECODED_PERHAPS: dict[str, Limits] = {"followed_agreement": SHARE, "perplexity_ratio": AMOUNT}


@dataclass(frozen=True)
class Place:
    """An object of a file of results.

    Attributes:
        path: the file. of: what the object says something of, for messages. data: the object.
    """

    path: Path
    of: str
    data: dict[str, Any]

    def refuse(self, name: str, found: Any, wanted: str) -> NoReturn:
        """Raises CarpoolError that names the value."""
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:60]} ..."
        raise CarpoolError(
            f"{self.path}: {name!r} of {self.of} is {shown}, not {wanted}; write the file anew with this version"
        )

    def get(self, name: str) -> Any:
        """Raises CarpoolError where it is not there."""
        if name not in self.data:
            raise CarpoolError(f"{self.path} lacks {name!r} of {self.of}; write the file anew with this version")
        return self.data[name]

    def inside(self, name: str, of: str | None = None) -> Place:
        """An object in this one."""
        found = self.get(name)
        if not isinstance(found, dict):
            self.refuse(name, found, "an object")
        return Place(self.path, of or f"{name!r} of {self.of}", found)

    def objects(self, name: str) -> list[Place]:
        """A list of objects."""
        found = self.items(name)
        if not all(isinstance(one, dict) for one in found):
            self.refuse(name, found, "a list of objects")
        return [Place(self.path, f"{name!r} of {self.of}", one) for one in found]

    def items(self, name: str, length: int | None = None) -> list[Any]:
        found = self.get(name)
        if not isinstance(found, list):
            self.refuse(name, found, "a list")
        if length is not None and len(found) != length:
            self.refuse(name, found, f"a list of {length}")
        return found

    def text(self, name: str) -> str:
        found = self.get(name)
        if not isinstance(found, str):
            self.refuse(name, found, "a text")
        return found

    def number(self, name: str, limits: Limits) -> float:
        return self._number(name, self.get(name), limits)

    def count(self, name: str, least: int = 0) -> int:
        found = self.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= MOST:
            self.refuse(name, found, f"a whole number from {least} on")
        return found

    def numbers(self, name: str, length: int | None = None, limits: Limits = AMOUNT) -> list[float]:
        """One or more."""
        found = self.items(name, length)
        if not found:
            self.refuse(name, found, "a list of numbers")
        return [self._number(name, one, limits) for one in found]

    def metric(self, name: str, limits: Limits) -> None:
        """A number, alone or as the value of an interval that holds it."""
        found = self.get(name)
        if not isinstance(found, dict):
            self._number(name, found, limits)
            return
        one = Place(self.path, f"{name!r} of {self.of}", found)
        value = one.number("value", limits)
        ends = [found.get("low"), found.get("high")]
        if ends == [None, None]:
            return
        low, high = (self._number(name, end, (-MOST, MOST)) for end in ends)
        slack = ROUNDING * max(abs(low), abs(high))
        if not low - slack <= value <= high + slack:
            self.refuse(name, found, "an interval that holds its value")

    def _number(self, name: str, found: Any, limits: Limits) -> float:
        low, high = limits
        if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= high:
            span = f"from {max(low, 0):g} on" if high == MOST else f"from {low:g} to {round(high, 3):g}"
            self.refuse(name, found, f"a number {span}" if low > -MOST else "a number")
        return float(found)


def require_row(row: Place, stock: Place) -> None:
    """Raises CarpoolError unless a policy's results are whole, and as wide as stock's at the same batch size."""
    for name, limits in METRICS.items():
        row.metric(name, limits)
    if "expected_loss" in row.data:
        row.metric("expected_loss", AMOUNT)
    row.numbers("union_by_layer", len(stock.numbers("union_by_layer")))
    for name in ("decoded_tokens", "masked_tokens", "batches"):
        if name in row.data:
            row.count(name)
    if row.data.get("details") is not None:
        _require_details(row, stock)


def require_decoding(row: Place) -> None:
    """Raises CarpoolError unless the results say what block diffusion decoded."""
    decoding = row.inside("decoding", f"the decoding of {row.of}")
    for name, limits in DECODED.items():
        decoding.metric(name, limits)
    for name, limits in DECODED_PERHAPS.items():
        if decoding.data.get(name) is not None:
            decoding.metric(name, limits)


def _require_details(row: Place, stock: Place) -> None:
    details = row.inside("details", f"the details of {row.of}")
    details.numbers("displaced_histogram")
    layers = len(row.items("union_by_layer"))
    domains, experts = _use(details, layers)
    if stock.data.get("details") is not None:
        like = _use(stock.inside("details", f"the details of {stock.of}"), layers)
        if (domains, experts) != like:
            wanted = f"of {', '.join(sorted(like[0]))} and {like[1]} experts, as stock's"
            details.refuse("expert_use", f"of {', '.join(sorted(domains))} and {experts} experts", wanted)
    for one in details.objects("worst_rows"):
        one.number("displaced_mass", SHARE)
        one.number("kl", METRICS["kl"])
        one.text("domain")
        if one.get("text") is not None:
            one.text("text")


def _use(details: Place, layers: int) -> tuple[set[str], int]:
    """Domains and number of experts of the counts of who uses which expert."""
    use = details.inside("expert_use")
    found: list[int] = []
    for domain in use.data:
        for place, counts in enumerate(use.items(domain, layers)):
            line = Place(use.path, f"{use.of}, layer {place}", {domain: counts})
            found.append(len(line.numbers(domain, found[0] if found else None)))
    if not found:
        details.refuse("expert_use", use.data, "counts by domain")
    return set(use.data), found[0]
