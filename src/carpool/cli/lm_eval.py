"""`carpool lm-eval`: the command line of lm-evaluation-harness, with Carpool's model types."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from carpool.cli.app import command
from carpool.errors import CarpoolError


# every option is the harness's, --help too
@command("lm-eval", add_help_option=False, context_settings={"ignore_unknown_options": True})
def lm_eval(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What `lm_eval` takes, such as --model carpool --tasks ...")
    ] = None,
) -> None:
    """Run a task of lm-evaluation-harness under a policy (docs/lm-eval.md); takes what `lm_eval` takes."""
    from carpool.lm_eval import register

    register()
    from lm_eval.__main__ import cli_evaluate

    given, sys.argv = sys.argv, ["lm_eval", *(arguments or ["--help"])]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise CarpoolError(f"{error}; `carpool lm-eval ls tasks` lists them") from None
    finally:
        sys.argv = given
