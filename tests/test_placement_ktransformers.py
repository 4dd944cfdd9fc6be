"""Frequencies of a trace as KTransformers reads them: its own code on our file, `make test-ktransformers`.

Its SGLang cannot be imported without CUDA, so that the one function that reads the file is taken out of it.
"""

from __future__ import annotations

import ast
import logging
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from placement_tools import random_trace

from carpool.artefacts.trace import Trace
from carpool.placement.export import expert_frequencies, write_ktransformers

kt_kernel = pytest.importorskip("kt_kernel", reason="KTransformers is in a folder of its own: make test-ktransformers")

LAYERS = 4  # of the model; the first is dense


def own_function(name: str) -> Any:
    """A function of `kt_ep_wrapper`, compiled from its file."""
    try:
        path = Path(str(distribution("sglang-kt").locate_file("sglang/srt/layers/moe/kt_ep_wrapper.py")))
    except PackageNotFoundError:
        pytest.skip("sglang-kt is not installed: make test-ktransformers")
    tree = ast.parse(path.read_text())
    tree.body = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name]
    known: dict[str, Any] = {
        "torch": torch, "dist": torch.distributed, "logger": logging.getLogger(__name__), "Optional": Any | None,
        "_KT_GPU_EXPERTS_MASKS": None, "get_tensor_model_parallel_rank": lambda: 0,
        "generate_gpu_experts_masks": kt_kernel.generate_gpu_experts_masks,
    }  # fmt: skip
    for one in ast.walk(tree):
        if isinstance(one, ast.FunctionDef):
            one.returns = None
    exec(compile(tree, path, "exec"), known)
    return known[name]


@pytest.fixture
def trace() -> Trace:
    made = random_trace(200, 3, 8, 2, seed=2, skew=2.0)
    return replace(made, facts=replace(made.facts, layers=(1, 2, 3)))


def masks(path: Path, kept: int) -> Any:
    """Bool `[layers, E]`: experts that KTransformers keeps on the GPU, `kept` a layer on average."""
    config = SimpleNamespace(num_hidden_layers=LAYERS, num_experts=8, first_k_dense_replace=1)
    arguments = SimpleNamespace(
        get_hf_config=lambda: config, kt_gpu_experts_ratio=None, kt_num_gpu_experts=kept,
        kt_expert_placement_strategy="frequency", init_expert_location=str(path),
    )  # fmt: skip
    return own_function("_init_kt_gpu_experts_masks")(arguments)


def test_ktransformers_keeps_the_experts_that_the_trace_uses_most(trace: Trace, tmp_path: Path) -> None:
    write_ktransformers(tmp_path / "counts.pt", trace, LAYERS)
    counts_LE = expert_frequencies(trace, LAYERS)
    kept_LE = masks(tmp_path / "counts.pt", 3)
    assert kept_LE[0].all(), "a dense layer is on the GPU"
    assert int(kept_LE[1:].sum()) == 9
    assert counts_LE[1:][kept_LE[1:]].min() >= counts_LE[1:][~kept_LE[1:]].max()


def test_counts_of_another_model_are_refused_there(trace: Trace, tmp_path: Path) -> None:
    write_ktransformers(tmp_path / "counts.pt", trace, LAYERS + 1)
    with pytest.raises(ValueError, match=r"num_layers \(5\) doesn't match"):
        masks(tmp_path / "counts.pt", 3)
