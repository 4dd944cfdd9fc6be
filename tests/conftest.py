"""Tests are the same on every run: hypothesis draws from a fixed seed and has no deadline. What several files need."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

# read when Triton is imported: without a GPU kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=15, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("fixed")

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the recipes, which are folders of scripts and no packages."""
    for folder in ("reference_model", "diffusion_model"):
        monkeypatch.syspath_prepend(str(RECIPES / folder))
    return importlib.import_module
