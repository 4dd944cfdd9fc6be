"""Reads the JSON files that a report shows, or says in one sentence what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.evaluate.results import SCHEMA
from carpool.plans.grammar import parse
from carpool.policies.controls import CONTROLS
from carpool.report.checked import AMOUNT, METRICS, SHARE, Place, require_decoding, require_row

KIND, BLOCKS, INTERFERENCE = "carpool evaluation", "carpool block diffusion", "carpool interference"


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

    def interval(self, name: str) -> tuple[float, float] | None:
        """A metric's interval, where there is one."""
        found = self.data[name]
        low, high = (found.get("low"), found.get("high")) if isinstance(found, dict) else (None, None)
        return None if low is None or high is None else (float(low), float(high))


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
        CarpoolError: no file, not readable, not such results, another schema, results without stock, or no evaluation.
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
    file = Place(path, "the file", content)
    edges = file.numbers("histogram_edges")
    rows = file.objects("results")
    for row in rows:
        row = replace(row, of=row.text("policy"))
        for name in ("kl", "kl_between_co_batches"):
            spread = row.inside(name)
            spread.numbers("histogram", len(edges) + 1)
            spread.number("mean", METRICS["kl"])
            for quantile in ("p99", "p100"):
                spread.inside("quantiles").number(quantile, METRICS["kl"])
        for name in ("flipped_greedy", "unstable_greedy", "worst_displaced_mass"):
            row.number(name, SHARE)
        if row.get("worst_token") is not None and row.inside("worst_token").get("text") is not None:
            row.inside("worst_token").text("text")
    return Interference(label, _facts(file), tuple(row.data for row in rows))


def _evaluation(path: Path, label: str, content: dict[str, Any]) -> Evaluation:
    file = Place(path, "the file", content)
    found: list[tuple[Place, int]] = []
    for row in file.objects("results"):
        policy, batch = row.text("policy"), row.count("batch", 1)
        found.append((Place(path, f"{policy} at batch {batch}", row.data), batch))
    if all(row.data["policy"] == "stock" for row, _ in found):
        raise CarpoolError(f"{path} holds no results of a policy; evaluate again")
    names = [row.of for row, _ in found]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise CarpoolError(f"{path} holds {twice} twice; write the file anew with this version")
    stocks = {batch: row for row, batch in reversed(found) if row.data["policy"] == "stock"}
    for row, batch in found:
        if batch not in stocks:
            raise CarpoolError(f"{path} lacks results of stock at batch {batch}; evaluate again with this version")
        # before there were surrogates, experts were all that is read
        row.data.setdefault("bytes_share", row.get("union_share"))
        require_row(row, stocks[batch])
        if content["kind"] == BLOCKS:
            require_decoding(row)
    rows = tuple(Row(label, *method_of(row.data["policy"]), row.data) for row, _ in found)
    return Evaluation(label, _facts(file), rows)


def _facts(file: Place) -> dict[str, Any]:
    """Everything but the results."""
    facts = {name: value for name, value in file.data.items() if name != "results"}
    if "model" in facts:
        model = file.inside("model")
        if "expert_bytes" in model.data:
            model.number("expert_bytes", AMOUNT), model.number("other_bytes", AMOUNT), model.count("layers", 1)
    if "texts" in facts:
        for one in file.objects("texts"):
            one.text("name")
    if facts.get("findings") and not all(isinstance(one, str) for one in file.items("findings")):
        file.refuse("findings", facts["findings"], "a list of texts")
    return facts


def method_of(policy: str) -> tuple[str, bool]:
    """What the settings of a method have in common (its name, texts, flags, warm-up and guards), and whether it is a
    control."""
    if policy == "stock":
        return "stock", True
    try:
        plan = parse(policy)
    except CarpoolError:  # a policy of a package that is not installed here
        return policy.split("(")[0], False
    kept = [
        f"{field.name}={value!r}"
        for field in fields(plan.policy)
        if (isinstance(value := getattr(plan.policy, field.name), str | bool) or field.name == "warmup")
        and value != field.default
    ]
    name = plan.policy.name + (f"({', '.join(kept)})" if kept else "")
    return " | ".join((name, *map(str, plan.guards))), plan.policy.name in CONTROLS
