"""The benchmark of bytes: where a curve crosses a KL, and what is compared with what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from carpool import parse
from carpool.evaluate.equal_bytes import Points


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import expert_bytes

    yield expert_bytes
    for name in ("expert_bytes", "expert_methods"):
        sys.modules.pop(name)


def curve(*points: tuple[float, float]) -> Points:
    """Shares of bytes and KLs, the same in all samples."""
    shares, kls = zip(*points, strict=True)
    return Points(np.tile(shares, (11, 1)), np.tile(np.log(kls), (11, 1)))


def test_a_curve_is_read_in_log_kl(benchmark: ModuleType) -> None:
    line = curve((0.1, 0.1), (0.2, 0.01), (0.3, 0.001))
    assert benchmark.bytes_at(line, 0.01)[0] == pytest.approx(0.2)
    assert benchmark.bytes_at(line, 10**-1.5)[0] == pytest.approx(0.15)
    assert benchmark.bytes_at(line, 0.2) is None, "no setting loses so much"
    assert benchmark.bytes_at(line, 0.0001) is None, "no setting loses so little"


def test_what_loses_less_at_its_fewest_bytes_needs_no_more(benchmark: ModuleType) -> None:
    line = curve((0.1, 0.1), (0.2, 0.01))
    assert benchmark.least(line, 0.2)[0] == 0.1
    assert benchmark.least(line, 0.05) is None


def test_a_setting_that_reads_more_and_loses_more_does_not_help(benchmark: ModuleType) -> None:
    bent = curve((0.1, 0.1), (0.2, 0.01), (0.25, 0.02), (0.3, 0.001))
    assert benchmark.bytes_at(bent, 0.02)[0] == pytest.approx(0.1 + 0.1 * np.log(5) / np.log(10))


def test_every_setting_is_a_plan_on_a_file_that_is_made(benchmark: ModuleType) -> None:
    files = {benchmark.NESTED, benchmark.SHIPPED}
    files |= {benchmark.uniform(bits, group) for bits in benchmark.BITS for group in benchmark.GROUPS}
    names = [method.name for method in benchmark.methods()]
    assert len(names) == len(set(names))
    assert benchmark.OURS in names
    assert set(benchmark.CONTROLS) <= set(names)
    for method in benchmark.methods():
        assert len(method.settings) >= 3
        for file, text in method.settings:
            assert file in files
            parse(text).check(64, 8)


def test_what_was_measured_is_found_again_and_nothing_else(benchmark: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("one")
    given = (tmp_path, [text], 16, 64, "nested-64", "depth(bytes=0.2)")
    first = benchmark.kept(*given)
    assert benchmark.kept(*given) == first
    others = [
        (*given[:2], 4, *given[3:]),
        (*given[:3], 40, *given[4:]),
        (*given[:4], "x", given[5]),
        (*given[:5], "stock"),
    ]
    assert len({first, *(benchmark.kept(*one) for one in others)}) == 5
    text.write_text("another")
    assert benchmark.kept(*given) != first


def test_shallower_files_are_no_alternatives_to_the_deep_one(benchmark: ModuleType) -> None:
    from expert_methods import FEWER, fewer

    names = [method.name for method in benchmark.methods()]
    assert {fewer(bits) for bits in FEWER} <= set(names)
    assert all(fewer(bits).startswith(benchmark.OURS) for bits in FEWER)


def test_some_settings_of_a_method_can_be_measured(benchmark: ModuleType) -> None:
    method = benchmark.Method("a", (("x", "one"), ("y", "two"), ("y", "three")))
    assert benchmark.only(method, lambda file, plan: file == "y" and "w" in plan).settings == (("y", "two"),)
    assert benchmark.only(method, lambda file, plan: False) == benchmark.Method("a", ())
