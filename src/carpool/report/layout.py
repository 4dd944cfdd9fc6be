"""What a page is made of: sections, tabs and choosers, which its script opens and closes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Panes = Sequence[tuple[str, str]]  # name, HTML


def section(title: str, note: str, body: str) -> str:
    """A part of the page under a heading."""
    said = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def tabs(panes: Panes, opened: int) -> str:
    """Panes of which one is seen, with a button each; one alone needs no button."""
    if len(panes) == 1:
        return panes[0][1]
    buttons = "".join(f'<button type="button">{escape(name)}</button>' for name, _ in panes)
    return f'<div class="tabs" data-opened="{opened}"><nav>{buttons}</nav>{_bodies(panes)}</div>'


def chooser(panes: Panes, opened: int) -> str:
    """Panes of which one is seen, in a list to choose from: for many."""
    options = "".join(
        f"<option{' selected' if place == opened else ''}>{escape(name)}</option>"
        for place, (name, _) in enumerate(panes)
    )
    return f'<div class="chooser"><select>{options}</select>{_bodies(panes)}</div>'


def _bodies(panes: Panes) -> str:
    return "".join(f"<div>{body}</div>" for _, body in panes)
