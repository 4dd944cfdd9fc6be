"""The kernels for CPUs, compiled on first use by torch's extension builder and kept in its cache."""

from __future__ import annotations

import logging
import os
import shutil
import time
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("native")
FLAGS = ["-O3", "-ffp-contract=off", "-fopenmp", "-w"]  # a sum that a compiler rearranges is another sum
STALE = 900  # seconds after which a builder that left its lock behind is taken for dead


@cache
def ready() -> bool:
    """Whether `torch.ops.carpool.read_experts` is there for CPUs; compiles it when it is asked for first (a minute).

    Where that fails, one sentence in the log says why, and what reads experts falls back to plain torch.
    """
    log = logging.getLogger("carpool")
    try:
        from torch.utils import cpp_extension

        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None or not cpp_extension.is_ninja_available():
            missing = "ninja (`pip install ninja`)" if shutil.which(compiler) else f"a C++ compiler ({compiler})"
            log.warning("carpool reads experts in plain torch, which is slow: %s is missing", missing)
            return False
        _clear_stale_lock(cpp_extension)
        cpp_extension.load(
            "carpool_experts",
            sorted(str(path) for path in SOURCES.glob("*.cpp")),
            extra_cflags=FLAGS,
            is_python_module=False,
        )
    except Exception as error:  # a compiler may fail in any way
        lines = (str(error).strip() or type(error).__name__).splitlines()
        cause = next((line for line in lines if " error: " in line.lower()), lines[0])[:300]
        log.warning("carpool reads experts in plain torch, which is slow: its kernels cannot be built (%s)", cause)
        return False
    torch.library.register_fake("carpool::read_experts", lambda hidden, *_: torch.empty_like(hidden))
    return True


def _clear_stale_lock(cpp_extension: object) -> None:
    """Builders wait for another one's lock without end, also for that of one that was killed."""
    folder = Path(cpp_extension._get_build_directory("carpool_experts", verbose=False))  # type: ignore[attr-defined]
    lock = folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE:
        lock.unlink(missing_ok=True)


def instructions() -> list[str]:
    """Kinds of instructions that this processor has kernels for, the fastest first."""
    return list(torch.ops.carpool.instructions()) if ready() else []
