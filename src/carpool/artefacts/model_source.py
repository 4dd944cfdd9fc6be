"""Where a model lies, and its configuration as it is written: known before torch is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def source_of(path: str | Path | None) -> tuple[str, bool]:
    """Where to load from, and whether that is a folder.

    Args:
        path: a folder in transformers format, or a name `organisation/model` on the Hugging Face hub; None is the
            reference model (`carpool[demo]`).

    Raises:
        CarpoolError: no such folder, one without a configuration, or a file.
    """
    if path is None:
        try:
            from carpool_demo import MODEL
        except ImportError:
            raise CarpoolError("the reference model is not installed: pip install 'carpool[demo]'") from None
        path = MODEL
    folder = Path(path).expanduser()
    if str(path) and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CarpoolError(f"{path} has no config.json; give a folder in transformers format")
        return str(folder), True
    if folder.is_file():
        raise CarpoolError(f"{path} is a file; give the folder of a model in transformers format")
    if isinstance(path, str) and HUB_NAME.fullmatch(path):
        return path, False
    raise CarpoolError(f"there is no folder {str(path)!r}; give a model's folder, or its name as organisation/model")


def folder_of(source: str) -> Path | None:
    """The folder of a model by its path or its name on the hub, if it is on this machine."""
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return path
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def configuration(model: str | Path) -> dict[str, Any]:
    """What is written in a model's folder, in a `config.json`, or under a name in the local cache; empty where that is
    not plain."""
    path = Path(model).expanduser()
    file: Any = path / "config.json" if path.is_dir() else path
    if not path.exists():
        try:
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(str(model), "config.json")
        except (ImportError, ValueError):  # ValueError: no name of a model
            return {}
    try:
        content = read_json(Path(file), any_number=True) if isinstance(file, str | Path) else None
    except CarpoolError:
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("model_type"), str) else {}
