"""The `carpool` command. The one module that knows all the others; everything heavy is imported when it is used."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; tells what to install where the command line's own dependencies are missing."""
    try:
        from carpool.cli.commands import app
    except ModuleNotFoundError as error:
        sys.exit(f"carpool: {error.name} is missing; install carpool[cli] or one of its extras (transformers, vllm)")
    app()
