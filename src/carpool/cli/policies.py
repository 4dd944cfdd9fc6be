"""`carpool policies`: what can be written in a policy text."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from carpool.cli.app import command


@command("policies")
def list_policies() -> None:
    """List policies (name, parameters, kind, paper) and the guards that may follow one."""
    from carpool.plans.guards import GUARDS
    from carpool.policies import policies

    console = Console()
    table = Table("policy", "parameters", "kind", "paper", box=None, header_style="bold")
    for name, policy in policies().items():
        table.add_row(name, _parameters(policy), policy.kind, policy.paper)
    console.print(table)
    console.print()
    table = Table("guard", "parameters", "what it does", box=None, header_style="bold")
    for name, guard in GUARDS.items():
        about = " ".join((guard.__doc__ or "").split("\n\n")[0].split())
        table.add_row(name, _parameters(guard), about)
    console.print(table)
    console.print()
    console.print("written as: xshare(budget=32) | protect([3, 7]) | floor(0.3)", highlight=False, markup=False)


def _parameters(kind: Any) -> str:
    return ", ".join(f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(kind) if f.init)
