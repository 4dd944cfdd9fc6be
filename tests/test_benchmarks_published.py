"""The benchmark of other published methods: its rows are plans, files are put together, curves are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import tiny_model

from carpool import parse
from carpool.calibrate import calibrate
from carpool.hosts.transformers import find_layers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import published_bytes

    yield published_bytes
    sys.modules.pop("published_bytes")


def test_every_row_is_a_plan_on_files_that_are_made(benchmark: ModuleType) -> None:
    rows = benchmark.rows()
    assert len({(row.method, row.policy) for row in rows}) == len(rows)
    for row in rows:
        assert set(row.files) <= set(benchmark.TOKENS)
        parse(row.policy).check(64, 8)


def test_statistics_of_one_model_are_put_together(benchmark: ModuleType, tmp_path: Path) -> None:
    for name, seed, energy in (("a", 0, False), ("b", 0, True), ("c", 1, True)):
        model = tiny_model("qwen3_moe", seed=seed)
        ids_BT = torch.randint(3, 64, (8, 64), generator=torch.Generator().manual_seed(0))
        calibrate(model, find_layers(model), ids_BT, energy=energy).save(tmp_path / f"{name}.safetensors")
    both = benchmark.together(tmp_path, ("a", "b"))
    assert {"similarity_routed", "reap", "easy_ep"} <= set(both.layers[0])
    with pytest.raises(SystemExit, match="different models"):
        benchmark.together(tmp_path, ("a", "c"))


def test_a_curve_between_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generators.published_bytes import at

    curve = [(0.1, 0.1), (0.2, 0.01), (0.3, 0.001)]
    assert at(curve, 0.15) == pytest.approx(10**-1.5)
    assert at(curve, 0.2) == pytest.approx(0.01)
    assert at(curve, 0.05) is None
    assert at(curve, 0.31) is None
