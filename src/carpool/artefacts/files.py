"""Writing files so that nobody ever sees half of one, and reading tensors from files that may be anything."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 16 << 20  # bytes of a safetensors header; thousands of tensors take less than 1 MB


def require_writable(path: str | Path, ending: str = "") -> Path:
    """The path, if a file can be written there; call it before long work.

    Args:
        ending: that the name must have, such as `.safetensors`; empty: any.

    Raises:
        CarpoolError: the folder is missing or read-only, the path names something that is no regular file, or it ends
            otherwise.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CarpoolError(f"cannot write {path}: it exists and is not a regular file")
    require_folder_around(path)
    if not path.name.endswith(ending):
        raise CarpoolError(f"cannot write {path}: what is written there is a {ending} file; name it so")
    return path


def require_folder_around(path: Path) -> None:
    """Raises CarpoolError unless something may be made in the folder that a path lies in."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise CarpoolError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CarpoolError(f"cannot write {path}: the folder {folder} is not writable")


def require_file(path: str | Path, what: str = "") -> Path:
    """The path, if a regular file is there (a pipe would keep its reader waiting for ever).

    Args:
        what: of the file, for the message.

    Raises:
        CarpoolError: nothing is there, it cannot be looked at, or it is no regular file.
    """
    path, what = Path(path), what and f"{what} "
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be a path
        raise CarpoolError(f"cannot read {what}{path}: {getattr(error, 'strerror', None) or error}") from None
    if not regular:
        raise CarpoolError(f"cannot read {what}{path}: it is not a regular file")
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes if the block raises.

    An older file at `path` stays as it was until the new one is complete and on disk.

    Raises:
        CarpoolError: the file cannot be written (see `require_writable`), or the disk says no.
    """
    target = require_writable(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # some writers make files that only their owner may read
        temporary.replace(target)
    except OSError as error:
        raise CarpoolError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, content: str) -> None:
    """Write a UTF-8 text file in one piece (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        CarpoolError: the file cannot be read.
    """
    require_file(path)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CarpoolError(f"cannot read {path}: {error.strerror}") from None


def read_safetensors(
    path: str | Path, wanted: Callable[[str], bool] = bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Args:
        wanted: by name, whether a tensor is read; default: all.

    Raises:
        CarpoolError: the file cannot be read, is none, is truncated, or its header is damaged or beyond reason.
    """
    with opened_safetensors(path) as file:
        # copies: what is read stays as it is when somebody writes over the file
        names = filter(wanted, list(file.keys()))
        tensors = {name: file.get_tensor(name).clone() for name in names}
        return tensors, dict(file.metadata() or {})


def safetensors_names(path: str | Path) -> list[str]:
    """The names of a file's tensors, of which none is read; raises what `read_safetensors` raises for its header."""
    with opened_safetensors(path) as file:
        return list(file.keys())


def safetensors_sizes(path: str | Path) -> dict[str, int]:
    """Bytes of a file's tensors by name; none is read. Raises what `read_safetensors` raises for its header."""
    from carpool.artefacts.json_text import parse_json

    names = safetensors_names(path)
    with Path(path).open("rb") as opened:
        header = parse_json(opened.read(int.from_bytes(opened.read(8), "little")), f"the header of {path}")
    return {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}


@contextmanager
def opened_safetensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, tensor by tensor; raises what `read_safetensors` raises."""
    from safetensors import SafetensorError, safe_open

    path = require_file(path)
    try:
        with path.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        size = path.stat().st_size
    except OSError as error:
        raise CarpoolError(f"cannot read {path}: {error.strerror}") from None
    if size < 8 or header > MAX_HEADER:
        raise CarpoolError(f"{path} is not a safetensors file ({size} bytes that claim a header of {header})")
    if 8 + header > size:
        raise CarpoolError(f"{path} is truncated: it has {size} bytes, its header alone takes {header}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CarpoolError(f"{path} is no safetensors file, or is damaged or truncated ({error})") from None
