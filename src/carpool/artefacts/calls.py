"""Settings as text, `name(3, key=value) | other`: names, literals and `|` are all there is; parsed, never evaluated."""

from __future__ import annotations

import ast
from typing import Any

from carpool.errors import CarpoolError

MAX_TEXT = 10_000  # characters; deeper nesting than any setting needs would exhaust the parser's stack
SHOWN = 200  # characters of a text that an error repeats
Call = tuple[str, list[Any], dict[str, Any]]  # a name with what stands in its brackets


def read_calls(text: str, what: str) -> list[Call]:
    """The calls between the `|`, left to right; a bare name is one without arguments.

    Args:
        what: the text is, for errors, such as `the policy text`.

    Raises:
        CarpoolError: the text is too long, or anything else.
    """
    if len(text) > MAX_TEXT:
        raise CarpoolError(f"{what} of {len(text)} characters; {MAX_TEXT} is the limit")
    try:
        return [_call(node, text) for node in _split(ast.parse(text.strip(), mode="eval").body)]
    except CarpoolError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CarpoolError(f"cannot read {what} {short(text)}: write name(parameter=value) | guard(...)") from None


def short(text: str) -> str:
    """As an error repeats it."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _split(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_split(node.left), *_split(node.right)]
    return [node]


def _call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise CarpoolError(f"cannot read {short(ast.unparse(node))} in {short(text)}: write name(parameter=value)")
    kwargs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise CarpoolError(f"cannot read {short(ast.unparse(node))}: each parameter once, as name=value")
        kwargs[keyword.arg] = _literal(keyword.value, node.func.id)
    return node.func.id, [_literal(argument, node.func.id) for argument in node.args], kwargs


def _literal(node: ast.expr, name: str) -> Any:
    for part in ast.walk(node):  # however deep: Python refuses to print a number of thousands of digits
        if isinstance(part, ast.Constant) and isinstance(part.value, int | float) and not part.value <= 2**53:
            raise CarpoolError(f"a number beyond 2**53 in {short(name)}; no parameter takes one")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: an unhashable key
        raise CarpoolError(
            f"{short(ast.unparse(node))} is not a literal; values are numbers, strings and lists"
        ) from None
