"""What the commands register with, and how they report errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from carpool.errors import CarpoolError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
errors = Console(stderr=True)


@app.callback()
def about() -> None:
    """Share experts between the tokens of a batch: measure, calibrate, compare."""


def command(name: str, **settings: Any) -> Callable[[Callable], Callable]:
    """Register a command whose CarpoolErrors are printed as one sentence, with exit code 2; `settings` are typer's."""

    def register(function: Callable) -> Callable:
        @app.command(name, **settings)
        @functools.wraps(function)
        def guarded(*args: object, **kwargs: object) -> None:
            try:
                function(*args, **kwargs)
            except CarpoolError as error:
                errors.print(f"[bold red]carpool {name}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
                raise typer.Exit(2) from None

        return guarded

    return register
