"""How the command line reports errors: one sentence, as it is, and exit code 2."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from carpool.cli.commands import app


@pytest.mark.parametrize("text", ["xshare([/x])", "[bold]x[/]"])
def test_markup_in_a_users_text_is_only_text(text: str) -> None:
    shown = CliRunner().invoke(app, ["policies", text])
    assert shown.exit_code == 2
    assert isinstance(shown.exception, SystemExit)
    assert text in shown.output.replace("\n", "")
