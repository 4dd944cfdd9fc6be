"""Graphs compiled ahead of time into a library, for CPUs.

Between two layers the engine streams megabytes of experts through the caches, so every call of the router starts cold:
what Python does around a just-in-time compiled graph then takes longer than the graph.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

ONE_THREAD = {"cpp.threads": 1}  # a layer's routing is too little work to share out


def compile_ahead(
    function: Callable[..., Any], given: Sequence[Tensor | None], with_rows: int, options: dict[str, Any]
) -> Callable[..., tuple[Any, ...]]:
    """A function of the same tensors, compiled for any number of rows.

    A library that was made before is taken from the folder of torch's compiler (`TORCHINDUCTOR_CACHE_DIR`).

    Args:
        function: of tensors, to a tuple of tensors and None.
        given: an example of what it is called with. None stays None in every call.
        with_rows: how many of the first arguments have a dimension of rows or requests.
        options: of inductor.
    """
    present = [place for place, value in enumerate(given) if value is not None]
    module = _Present(function, len(given), present)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} if place < with_rows else None for place in present)
    example = tuple(value for value in given if value is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's of its own classes
        exported = torch.export.export(module, example, dynamic_shapes=(dynamic,), strict=False)
        run = _loaded(exported, ONE_THREAD | options)

    def call(*values: Tensor | None) -> tuple[Any, ...]:
        return tuple(run([value for value in values if value is not None]))

    return call


class _Present(torch.nn.Module):
    """A function as a module of the arguments that are not None."""

    def __init__(self, function: Callable[..., Any], count: int, present: list[int]) -> None:
        super().__init__()
        self._function, self._count, self._present = function, count, present

    def forward(self, *tensors: Tensor) -> Any:
        values: list[Tensor | None] = [None] * self._count
        for place, tensor in zip(self._present, tensors, strict=True):
            values[place] = tensor
        return self._function(*values)


def _loaded(exported: torch.export.ExportedProgram, options: dict[str, Any]) -> Callable[[list[Tensor]], Any]:
    """The compiled program, without the package's own handling of nested arguments."""
    package = torch._inductor.aoti_load_package(_built(exported, options), run_single_threaded=True)
    return package.loader.run


def _built(exported: torch.export.ExportedProgram, options: dict[str, Any]) -> str:
    """The path of the graph's library, which is compiled if no process of this machine has done so."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "carpool"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_digest(exported, options)}.pt2"
    if not path.exists():
        with TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "graph.pt2"
            torch._inductor.aoti_compile_and_package(exported, package_path=str(made), inductor_configs=options)
            made.replace(path)
    return str(path)


def _digest(exported: torch.export.ExportedProgram, options: dict[str, Any]) -> str:
    """Of all that a library depends on: operations, shapes, constants, compiler and processor."""
    constants = [
        (name, str(value.dtype), value.tolist()) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in sorted(exported.constants.items())
    ]
    code = exported.graph_module.print_readable(print_output=False, include_stride=True)
    facts = (code, constants, torch.__version__, torch.cpu.get_capabilities(), options)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
