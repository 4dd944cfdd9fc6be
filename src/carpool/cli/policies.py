"""`carpool policies`: what can be written in a policy text."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from carpool.cli.app import command
from carpool.cli.catalogue import Card, guard_cards, policy_cards
from carpool.cli.options import ShowJson
from carpool.cli.table import Column, Row, print_table, say
from carpool.errors import CarpoolError

WRITTEN = "xshare(budget=32) | protect([3, 7]) | floor(0.3)"
WORD, TEXT, PROSE = (partial(Column, kind=kind) for kind in ("word", "text", "prose"))
ENGINES = {"transformers": "transformers (carpool.share, evaluate, tune)", "vllm": "vLLM (plugin)"}
IN_PLANES = "vLLM (plugin), on a checkpoint in planes: `carpool compress MODEL -o DIR`"
KINDS = {
    "token": "token: every token decides alone, whoever decodes beside it",
    "group": "group: all rows that share a coreset decide together (--group: batch, request, ...)",
}


@command("policies")
def list_policies(
    name: Annotated[str | None, typer.Argument(help="A policy or a guard to explain; default: list all.")] = None,
    as_json: ShowJson = False,
) -> None:
    """List policies and guards, or explain one: parameters, cost, engines, paper, an example."""
    policies, guards = policy_cards(), guard_cards()
    console = Console()
    if name is not None:
        if name not in policies | guards:
            raise CarpoolError(f"unknown policy or guard {name!r}; known names: {', '.join((*policies, *guards))}")
        card = (policies | guards)[name]
        facts = _facts(card) if name in policies else {}
        if as_json:
            typer.echo(json.dumps({**_as_dict(card), **facts}, indent=1))
        else:
            _explain(console, card, facts)
    elif as_json:
        found = {"policies": list(map(_as_dict, policies.values())), "guards": list(map(_as_dict, guards.values()))}
        typer.echo(json.dumps(found, indent=1))
    else:
        columns = [WORD("policy"), TEXT("parameters"), WORD("kind"), TEXT("paper", rank=1)]
        print_table(console, columns, [Row([one.name, one.written, one.kind, one.paper]) for one in policies.values()])
        console.print()
        columns = [WORD("guard"), TEXT("parameters"), PROSE("what it does")]
        print_table(console, columns, [Row([one.name, one.written, one.about]) for one in guards.values()])
        console.print()
        say(console, f"written as: {WRITTEN}")
        say(console, "explained by: carpool policies xshare")


def _as_dict(card: Card) -> dict[str, Any]:
    return {
        **asdict(card), "about": card.about, "example": card.example,
        "parameters": [
            {"name": name, "default": value, "meaning": card.told.get(name, "")}
            for name, value in card.parameters.items()
        ],
    }  # fmt: skip


def _facts(card: Card) -> dict[str, Any]:
    """What the code knows of a policy: the statistics that its example needs, and what it costs to decide."""
    from carpool.artefacts.statistics import made_by
    from carpool.kernels.traits import uncovered
    from carpool.plans.grammar import parse
    from carpool.policies.registry import policy_class

    kind = policy_class(card.name)
    needs: list[str] = []
    plan = None
    if "..." not in card.example:
        plan = parse(card.example)
        needs = [*plan.policy.required_stats()]
    fast = plan is not None and uncovered(plan, 64, 8) is None
    return {
        "statistics": needs,
        "made_by": made_by(needs[0]) if needs else None,
        "hidden_states": kind.needs_hidden,
        "cost": (
            "two kernel launches a layer on GPUs, one compiled graph on CPUs" if fast
            else "at most 15 tensor operations a layer, compiled into one graph"
        ) + ("; reads the router's input, too" if kind.needs_hidden else ""),
        "engines": [*ENGINES],
        "in_planes": kind.reads_depths is True,
    }  # fmt: skip


def _engine(name: str, in_planes: bool) -> str:
    return IN_PLANES if name == "vllm" and in_planes else ENGINES[name]


def _explain(console: Console, card: Card, facts: dict[str, Any]) -> None:
    console.print(f"[bold]{escape(card.name)}[/] {escape(f'({card.paper})' if card.paper else '')}", highlight=False)
    say(console, f"{card.about}\n")
    if card.parameters:
        columns = [WORD("parameter"), WORD("default"), PROSE("meaning and unit")]
        rows = [
            Row([name, "required" if value is None else value, card.told.get(name, "")])
            for name, value in card.parameters.items()
        ]
        print_table(console, columns, rows)
        console.print()
    for head in ("Needs", "Statistics", "Reading of the paper", "Identity"):
        if said := card.section(head):
            say(console, said, f"{head}:")
    if not facts:
        return
    stats = f" --stats {facts['made_by'].rpartition(' ')[2]}" if facts["made_by"] else ""
    lines = {
        "Kind": KINDS[card.kind],
        "Cost": facts["cost"],
        "Engines": ", ".join(_engine(one, facts["in_planes"]) for one in facts["engines"]),
    }
    commands = {
        **({"Statistics from": facts["made_by"]} if facts["made_by"] else {}),
        "Example": card.example if card.section("Needs") else f"carpool evaluate --policy '{card.example}'{stats}",
    }
    for head, said in lines.items():
        say(console, said, f"{head}:")
    for head, said in commands.items():  # in one line, to be pasted
        console.print(f"[bold]{head}:[/] {escape(said)}", highlight=False, soft_wrap=True)
