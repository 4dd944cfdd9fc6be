"""A checkpoint that Carpool made: a folder in transformers format, written in one piece, with a recipe beside it."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from carpool.artefacts.files import require_folder_around, write_text
from carpool.artefacts.json_text import read_json
from carpool.artefacts.origin import now, version
from carpool.errors import CarpoolError

RECIPE = "recipe.json"
METHOD = "carpool"  # how the configuration of a checkpoint in planes calls its quantisation


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint was made, and what that cost.

    Attributes:
        method: name of the method. parameters: all that it was given.
        fingerprint: of the source's routers (`carpool.artefacts.identity.fingerprint`). architecture: its class.
        data: `(file name, sha256)` of every text file that decided something.
        errors: what was measured on text that decided nothing, by name.
        sizes: bytes of an expert over those in 16 bits: as it is `stored` and, where it has depths, `read` by depth.
        created: date and time, ISO 8601, UTC. carpool_version: of the run.
    """

    method: str
    parameters: Mapping[str, Any]
    fingerprint: str
    architecture: str
    data: Sequence[tuple[str, str]]
    errors: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=now)
    carpool_version: str = field(default_factory=version)

    def save(self, folder: Path) -> None:
        """Write `recipe.json` into a folder."""
        write_text(folder / RECIPE, json.dumps(asdict(self), indent=1) + "\n")


def read_recipe(folder: Path) -> dict[str, Any]:
    """What `recipe.json` of a folder says.

    Raises:
        CarpoolError: it is missing or damaged.
    """
    content = read_json(folder / RECIPE, "the recipe")
    if not isinstance(content, dict):
        raise CarpoolError(f"{folder / RECIPE} is no recipe; make the checkpoint again")
    return content


def require_new_folder(path: str | Path) -> Path:
    """The path, if a folder can be made there; call it before long work.

    Raises:
        CarpoolError: a file or a folder with something in it is there, or the folder around it is missing or read-only.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise CarpoolError(f"cannot write {path}: the folder is not empty; name a new one")
    if path.exists() and not path.is_dir():
        raise CarpoolError(f"cannot write {path}: a file is there; name a folder")
    require_folder_around(path)
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends, and vanishes if the block raises.

    Raises:
        CarpoolError: see `require_new_folder`, or the disk says no.
    """
    target = require_new_folder(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(target)  # an empty folder gives way
    except OSError as error:
        raise CarpoolError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def planes_settings(config: Any) -> dict[str, Any] | None:
    """What a configuration (an object or what its JSON holds) says of experts in planes; None where they are none."""
    held = config.get if isinstance(config, dict) else functools.partial(getattr, config)
    given = held("quantization_config", None)
    return given if isinstance(given, dict) and given.get("quant_method") == METHOD else None


def planes_in(config: Any, folder: Path) -> Path | None:
    """The file with the experts of a checkpoint, by its configuration (an object or what its JSON holds); None where
    they are weights as usual.

    Raises:
        CarpoolError: they are planes, and the file is missing.
    """
    given = planes_settings(config)
    if given is None:
        return None
    path = folder / Path(str(given.get("file"))).name
    if not path.is_file():
        raise CarpoolError(f"{folder} is without its experts ({path.name}); copy the whole folder")
    return path
