"""Reads the JSON files that a report shows, or says in one sentence what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.evaluate.results import SCHEMA
from carpool.evaluate.table import CONTROLS
from carpool.plans.grammar import parse

KIND, BLOCKS, INTERFERENCE = "carpool evaluation", "carpool block diffusion", "carpool interference"
DECODED = ("union", "union_share", "tokens_per_forward", "agreement")  # of block diffusion, always there


@dataclass(frozen=True)
class Row:
    """One policy at one batch size; `data` is its entry in the file.

    Attributes:
        source: label of the file it comes from.
        method: what its settings have in common, such as `xshare(utility='squared')`; `stock` for stock.
        control: a control, or stock.
    """

    source: str
    method: str
    control: bool
    data: dict[str, Any]

    @property
    def policy(self) -> str:
        return str(self.data["policy"])

    @property
    def batch(self) -> int:
        return int(self.data["batch"])

    @property
    def decoded(self) -> Row:
        """Of a policy that decoded by block diffusion: what that gave."""
        return replace(self, data=self.data["decoding"])

    def value(self, name: str) -> float:
        """A metric's value, with or without an interval."""
        found = self.data[name]
        return float(found["value"] if isinstance(found, dict) else found)

    def ends(self, name: str) -> tuple[float, float]:
        """A metric's interval; the value itself where there is none."""
        found, value = self.data[name], self.value(name)
        low, high = (found.get("low"), found.get("high")) if isinstance(found, dict) else (None, None)
        return value if low is None else float(low), value if high is None else float(high)


@dataclass(frozen=True)
class Evaluation:
    """One file of results.

    Attributes:
        label: the file's name without its ending, made unique. facts: everything but the results.
        rows: in the file's order; stock comes first at every batch size.
    """

    label: str
    facts: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def batches(self) -> list[int]:
        """Batch sizes, ascending."""
        return sorted({row.batch for row in self.rows})

    def at(self, batch: int) -> list[Row]:
        """Rows of one batch size."""
        return [row for row in self.rows if row.batch == batch]

    def stock(self, batch: int) -> Row:
        """Stock at a batch size."""
        return next(row for row in self.at(batch) if row.policy == "stock")


@dataclass(frozen=True)
class Interference:
    """One file of `carpool evaluate --interference`.

    Attributes:
        label: as of an evaluation. facts: everything but the results. rows: a policy each, as they are in the file.
    """

    label: str
    facts: dict[str, Any]
    rows: tuple[dict[str, Any], ...]


def load(paths: Sequence[Path]) -> tuple[list[Evaluation], list[Interference]]:
    """Read result files of `carpool evaluate` (either way of decoding, or `--interference`) and of `carpool demo`.

    Raises:
        CarpoolError: no file, not readable, not such results, another schema, results without stock, no evaluation, or
            both ways of decoding.
    """
    if not paths:
        raise CarpoolError("no results were given: name one or more JSON files of `carpool evaluate --json`")
    _require_distinct(paths)
    labels: list[str] = []
    for path in paths:
        label, count = path.stem, 2
        while label in labels:
            label, count = f"{path.stem} ({count})", count + 1
        labels.append(label)
    evaluations: list[Evaluation] = []
    interferences: list[Interference] = []
    for path, label in zip(paths, labels, strict=True):
        content = _content(path)
        if content["kind"] != INTERFERENCE:
            evaluations.append(_evaluation(path, label, content))
        else:
            interferences.append(_interference(path, label, content))
    if not evaluations:
        raise CarpoolError("a report needs results of `carpool evaluate` beside those of `--interference`")
    if len({one.facts["kind"] for one in evaluations}) > 1:
        raise CarpoolError("block diffusion and step-by-step decoding do not compare; make a report of each")
    return evaluations, interferences


def _require_distinct(paths: Sequence[Path]) -> None:
    """The same results twice would look like two measurements."""
    seen: dict[bytes, Path] = {}
    for path in paths:
        content = _bytes(path)
        first = seen.setdefault(content, path)
        if first is not path:
            same = "is given twice" if first == path else f"holds the same results as {first}"
            raise CarpoolError(f"{path} {same}; name each file of results once")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CarpoolError(f"cannot read the results {path}: {error.strerror}") from None


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path, "the results")
    if not isinstance(content, dict) or content.get("kind") not in (KIND, BLOCKS, INTERFERENCE):
        raise CarpoolError(
            f"{path} holds no results of an evaluation; give a file that `carpool evaluate --json` wrote"
        )
    if content.get("schema") != SCHEMA:
        raise CarpoolError(f"{path}: schema {content.get('schema')!r}, this version of Carpool reads schema {SCHEMA}")
    return content


def _interference(path: Path, label: str, content: dict[str, Any]) -> Interference:
    try:
        rows = tuple(content.pop("results"))
        for row in rows:
            for name in ("kl", "kl_between_co_batches"):
                found = row[name]
                if len(found["histogram"]) != len(content["histogram_edges"]) + 1:
                    raise ValueError
                float(found["mean"]), float(found["quantiles"]["p99"]), float(found["quantiles"]["p100"])
            for name in ("flipped_greedy", "unstable_greedy", "worst_displaced_mass"):
                float(row[name])
            str(row["policy"]), row["worst_token"]
    except (KeyError, TypeError, ValueError):
        raise CarpoolError(f"{path} lacks results that a report needs; evaluate again with this version") from None
    return Interference(label, content, rows)


def _evaluation(path: Path, label: str, content: dict[str, Any]) -> Evaluation:
    try:
        rows = tuple(_row(label, entry) for entry in content.pop("results"))
        made = Evaluation(label, content, rows)
        for batch in made.batches:
            made.stock(batch)
        if content["kind"] == BLOCKS:
            for row in rows:
                for name in DECODED:
                    row.decoded.ends(name)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise CarpoolError(f"{path} lacks results that a report needs; evaluate again with this version") from None
    if not rows:
        raise CarpoolError(f"{path} holds no results; evaluate again")
    return made


def _row(label: str, entry: dict[str, Any]) -> Row:
    method, control = method_of(entry["policy"])
    entry.setdefault("bytes_share", entry["union_share"])  # before there were surrogates, experts were all that is read
    row = Row(label, method, control, entry)
    for name in ("union", "union_share", "bytes_share", "kl", "perplexity_ratio", "displaced_mass", "pairs"):
        row.ends(name)
    return row


def method_of(policy: str) -> tuple[str, bool]:
    """What the settings of a method have in common (its name, texts, flags and guards), and whether it is a control."""
    if policy == "stock":
        return "stock", True
    try:
        plan = parse(policy)
    except CarpoolError:  # a policy of a package that is not installed here
        return policy.split("(")[0], False
    kept = [
        f"{field.name}={value!r}"
        for field in fields(plan.policy)
        if isinstance(value := getattr(plan.policy, field.name), str | bool) and value != field.default
    ]
    name = plan.policy.name + (f"({', '.join(kept)})" if kept else "")
    return " | ".join((name, *map(str, plan.guards))), plan.policy.name in CONTROLS
