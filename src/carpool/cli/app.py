"""What the commands register with, and how they report errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

import carpool
from carpool.cli.table import say
from carpool.errors import CarpoolError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
errors = Console(stderr=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carpool {carpool.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Share experts between the tokens of a batch: measure, calibrate, compare."""


def command(name: str, group: typer.Typer = app, **settings: Any) -> Callable[[Callable], Callable]:
    """Register a command whose CarpoolErrors are printed as one sentence, with exit code 2; `settings` are typer's.

    A name of two words (`trace show`) is a command of a group, which has to be given too. The command takes its
    options one by one, or all as one dataclass, whose fields are annotated as options are.
    """

    def register(function: Callable) -> Callable:
        taking = _one_by_one(function)

        @group.command(name.rpartition(" ")[2], **settings)
        @functools.wraps(taking)
        def guarded(*args: object, **kwargs: object) -> None:
            try:
                taking(*args, **kwargs)
            except CarpoolError as error:
                say(errors, str(error), f"carpool {name}:", "bold red")
                raise typer.Exit(2) from None

        return guarded

    return register


def _one_by_one(function: Callable) -> Callable:
    """The function, taking one by one the fields of the dataclass that is its only parameter."""
    kinds: list[Any] = [kind for name, kind in get_type_hints(function).items() if name != "return"]
    if len(kinds) != 1 or not is_dataclass(kinds[0]):
        return function
    kind: Any = kinds[0]

    def taking(**given: Any) -> None:
        function(kind(**given))

    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name],
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
        )
        for one in fields(kind)
    ]  # fmt: skip
    taking.__doc__ = function.__doc__
    taking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return taking
