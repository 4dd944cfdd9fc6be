"""Names that can be imported and not used."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("torchvision.", "sgl_kernel.", "soundfile.")


class _Any(type):
    def __getattr__(cls, name: str) -> Any:
        return attribute(name)


class Absent(metaclass=_Any):
    """What stands for everything in a package that is not there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError("a stub, for text models on CPUs: install the package itself")


def attribute(name: str) -> Any:
    """`__getattr__` of a module or class."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(PACKAGES) else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = attribute  # type: ignore[method-assign]


sys.meta_path.append(_Finder())
