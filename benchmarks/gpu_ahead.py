"""The kernels of routing compiled for GPUs that are not here: registers, shared memory, spills."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_experts import DEPTHS, inputs, stored
from gpu_layer import SIZES, Call
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from carpool.kernels import launch
from carpool.kernels.experts import on_device
from carpool.kernels.experts.layout import Experts

TARGETS = (80, 90, 100)  # compute capabilities
TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.bool: "*i1", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float16: "*fp16",
}  # fmt: skip
OPTIONS = ("num_warps", "enable_fp_fusion")


class Catch:
    """In place of a kernel: keeps what it would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.given: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            self.options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            self.given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

        return run

    def compile(self, capability: int) -> Any:
        """For a GPU of this capability."""
        signature = dict.fromkeys(self.kernel.arg_names, "constexpr")
        aligned = {}
        for place, (name, value) in enumerate(self.given.items()):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                aligned[(place,)] = [["tt.divisibility", 16]]
        constants = {name: self.given[name] for name, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(self.kernel, signature, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def compiled(sizes: list[str], policies: list[str]) -> Iterator[dict[str, Any]]:
    """A line for every layer, policy, kernel and GPU."""
    kernels = {"vote": launch.vote, "decide": launch.decide}
    for name in sizes:
        for text in policies:
            call = Call.of(text, SIZES[name], 16, 1, torch.device("cpu"))
            caught = {kernel: Catch(function) for kernel, function in kernels.items()}
            vars(launch).update(caught)
            try:
                call.launches()
            finally:
                vars(launch).update(kernels)
            for kernel, one in caught.items():
                for capability in TARGETS:
                    made = one.compile(capability)
                    line = {"layer": name, "policy": text, "kernel": kernel, "gpu": f"sm_{capability}"}
                    yield line | {"warps": made.metadata.num_warps, "shared": made.metadata.shared} | usage(made)


def compiled_experts(sizes: list[str]) -> Iterator[dict[str, Any]]:
    """The same for the kernels that read experts, as a layer of bfloat16 rows launches them."""
    names = ("into_product", "out_product", "combine")
    kernels = {name: getattr(on_device, name) for name in names}
    for name in sizes:
        layer = replace(SIZES[name], experts=16)  # the number is none of the compiler's business
        held = stored(layer, torch.device("cpu"))
        caught = {kernel: Catch(function) for kernel, function in kernels.items()}
        vars(on_device).update(caught)
        try:
            hidden, ids, weights = inputs(layer, 16, 16, torch.device("cpu"))
            on_device.read_experts(hidden.bfloat16(), ids, weights, torch.full_like(ids, DEPTHS[0]), Experts.of(held))
        finally:
            vars(on_device).update(kernels)
        for kernel, one in caught.items():
            for capability in TARGETS:
                made = one.compile(capability)
                line = {"layer": name, "kernel": kernel, "gpu": f"sm_{capability}"}
                yield line | {"warps": made.metadata.num_warps, "shared": made.metadata.shared} | usage(made)


def usage(made: Any) -> dict[str, int]:
    """Registers a thread and bytes that do not fit into them, as the assembler tells."""
    code = made.asm["ptx"]
    [target] = re.findall(r"^\.target (\w+)", code, re.MULTILINE)
    tool = "ptxas" if int(re.sub(r"\D", "", target)) < 100 else "ptxas-blackwell"
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    [registers] = re.findall(r"Used (\d+) registers", told)
    return {"registers": int(registers), "spills": sum(map(int, re.findall(r"(\d+) bytes spill", told)))}
