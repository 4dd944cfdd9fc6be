"""Reading JSON that may hold anything: numbers of any length, NaN, a name twice, nesting without end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from carpool.artefacts.files import require_file
from carpool.errors import CarpoolError

MAX_BYTES = 64 << 20  # of a file; what this project writes takes a few MB
DIGITS = 300  # of a number; a float's largest has 309


def read_json(path: str | Path, what: str = "", *, most: int = MAX_BYTES, any_number: bool = False) -> Any:
    """The content of a JSON file, in UTF-8, UTF-16 or UTF-32.

    Args:
        what: the file is, for messages, such as `the policy file`.
        most: bytes it may have.
        any_number: see `parse_json`.

    Raises:
        CarpoolError: it cannot be read, is no regular file, is too large, or what `parse_json` raises.
    """
    path = require_file(path, what)
    named = f"{what} {path}" if what else str(path)
    try:
        size = path.stat().st_size
        if size > most:
            raise CarpoolError(f"{named} has {size} bytes; such a file has at most {most}")
        content = path.read_bytes()
    except OSError as error:
        raise CarpoolError(f"cannot read {named}: {error.strerror}") from None
    return parse_json(content, named, any_number=any_number)


def parse_json(text: str | bytes, where: str, *, any_number: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: it stands, for messages.
        any_number: also take what is no finite number or no number of an everyday length; such come out as `nan` or
            `inf`. For files of others, whose other fields nobody reads.

    Raises:
        CarpoolError: no JSON, nested too deeply, a name twice in one object, text that is not valid Unicode, a number
            that is not finite or too long.
    """
    hooks: dict[str, Any] = {"parse_int": _loose} if any_number else {
        "parse_int": _integer, "parse_float": _finite, "parse_constant": _refuse_constant, "object_pairs_hook": _object,
    }  # fmt: skip
    try:
        value = json.loads(text, **hooks)
        if not any_number:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        cause = "a text in it holds half a surrogate pair, which is not valid Unicode"
    except UnicodeDecodeError as error:
        cause = f"it is not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        cause = error.msg
    except RecursionError:
        cause = "nested too deeply"
    except _RefusedError as refused:
        cause = str(refused)
    else:
        return value
    raise CarpoolError(f"{where} is not JSON: {cause}")


class _RefusedError(Exception):
    """Why a value is not taken."""


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _RefusedError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {number[:20]} is not finite")
    return value


def _loose(digits: str) -> float | int:
    return int(digits) if len(digits) <= DIGITS else float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"it holds {name}; give finite numbers")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"the name {twice!r} comes twice in one object")
    return made
