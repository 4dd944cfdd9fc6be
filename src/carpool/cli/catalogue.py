"""Policies and guards as their sources describe them, read without importing them: importing torch takes seconds.

A policy of another package is imported, for its source may be anything.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from inspect import cleandoc
from pathlib import Path
from typing import Any

import carpool

POLICIES = Path(carpool.__file__).parent / "policies"
GUARDS = POLICIES.parent / "plans" / "guards.py"
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.M)


@dataclass(frozen=True)
class Card:
    """What a policy or guard says of itself.

    Attributes:
        name, kind, paper: of its class; a guard has neither of the last two.
        parameters: names in order, with the default as it is written; None where there is none.
        doc: the docstring without its indentation.
    """

    name: str
    kind: str
    paper: str
    parameters: Mapping[str, str | None]
    doc: str

    @property
    def about(self) -> str:
        """The first paragraph, in one line."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @property
    def written(self) -> str:
        """The parameters as they are listed: `budget, warmup=1`."""
        return ", ".join(name if value is None else f"{name}={value}" for name, value in self.parameters.items())

    def section(self, head: str) -> str:
        """A paragraph that begins with `HEAD:`, without that, in one line; empty where there is none."""
        for paragraph in self.doc.split("\n\n"):
            if paragraph.startswith(f"{head}:"):
                return " ".join(paragraph.removeprefix(f"{head}:").split())
        return ""

    @property
    def told(self) -> dict[str, str]:
        """What the docstring says of each parameter."""
        _, _, rest = self.doc.partition("Parameters:\n")
        parts = ENTRY.split(rest.partition("\n\n")[0])[1:]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return {name: " ".join(said.split()) for names, said in pairs for name in names.split(", ")}

    @property
    def example(self) -> str:
        """A text to begin with."""
        given = self.section("Example").strip("`.")
        required = [f"{name}=..." for name, value in self.parameters.items() if value is None]
        return given or f"{self.name}({', '.join(required)})"


def policy_cards() -> dict[str, Card]:
    """By name, those of installed packages included; raises CarpoolError for one of these that does not load."""
    cards = {card.name: card for file in sorted(POLICIES.glob("*.py")) for card in _read(file, "register")}
    if any(point.name not in cards for point in entry_points(group="carpool.policies")):
        from carpool.policies import policies

        cards |= {name: card_of(kind) for name, kind in policies().items() if name not in cards}
    return dict(sorted(cards.items()))


def guard_cards() -> dict[str, Card]:
    """By name, in the order of their file."""
    return {card.name: card for card in _read(GUARDS, "dataclass")}


def card_of(kind: Any) -> Card:
    """The card of a class that is imported anyway."""
    parameters = {one.name: None if one.default is MISSING else repr(one.default) for one in fields(kind) if one.init}
    return Card(kind.name, getattr(kind, "kind", ""), getattr(kind, "paper", ""), parameters, cleandoc(kind.__doc__))


def _read(file: Path, decorator: str) -> Iterator[Card]:
    """Cards of the named classes that a file decorates so."""
    for node in _classes(file).values():
        if any(_name(one) == decorator for one in node.decorator_list):
            said, parameters = _inherited(node)
            if "name" in said:
                doc = ast.get_docstring(node) or ""
                yield Card(said["name"], said.get("kind", ""), said.get("paper", ""), parameters, doc)


@cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _inherited(node: ast.ClassDef) -> tuple[dict[str, str], dict[str, str | None]]:
    """What a class and the policies that it inherits from say."""
    said, parameters = _said(node)
    for base in map(_name, node.bases):
        found = (classes[base] for file in POLICIES.glob("*.py") if base in (classes := _classes(file)))
        if (parent := next(found, None)) is not None:
            before, others = _inherited(parent)
            said, parameters = before | said, others | parameters
    return said, parameters


def _said(node: ast.ClassDef) -> tuple[dict[str, str], dict[str, str | None]]:
    """Texts of a class body by name, and its fields with their defaults."""
    texts: dict[str, str] = {}
    parameters: dict[str, str | None] = {}
    for one in node.body:
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
            texts |= {_name(target): one.value.value for target in one.targets}
        elif isinstance(one, ast.AnnAssign) and "ClassVar" in ast.unparse(one.annotation):
            if isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                texts[_name(one.target)] = one.value.value
        elif isinstance(one, ast.AnnAssign):
            parameters[_name(one.target)] = None if one.value is None else repr(ast.literal_eval(one.value))
    return texts, parameters


def _name(node: ast.expr) -> str:
    target = node.func if isinstance(node, ast.Call) else node
    return target.id if isinstance(target, ast.Name) else ""
