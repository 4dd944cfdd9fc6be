"""The leaderboard: its grid, and comparisons at equal bytes on sums whose answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from carpool.evaluate.equal_bytes import interpolated
from carpool.evaluate.intervals import FEWEST

LEADERBOARD = Path(__file__).parent.parent / "leaderboard"
EXPERIMENTS = sorted((LEADERBOARD / "experiments").glob("*.toml"))


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"leaderboard_{name}", LEADERBOARD / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_setting_of_the_grid_fits_the_reference_model(path: Path) -> None:
    run = module("run")
    experiment = run.read(path.stem)
    for batch, _, count in run.cells(experiment, ["math", "prose"]):
        plans = [plan for _, plan in run.plans_at(experiment, batch)]
        assert count >= FEWEST, "too few batches for an interval"
        assert len(plans) == len(set(plans)) > 1
        for plan in plans:
            plan.check(64, 8)


def test_an_experiment_like_another() -> None:
    run = module("run")
    frontier, domains = run.read("frontier"), run.read("domains")
    assert domains["series"] == frontier["series"]
    assert "batches" not in domains, "batches are an experiment's own"
    made = list(run.cells(domains, ["math", "prose"]))
    assert {domain for _, domain, _ in made} == {"math", "prose"}
    assert run.read("checkpoints")["series"] != frontier["series"]


def setting(label: str, share: float, kl: float, batches: int = 12) -> dict[str, Any]:
    """A setting that reads `share` of stock's bytes at this KL, in batches that differ in size."""
    sizes = [float(10 + index) for index in range(batches)]
    return {
        "label": label,
        "policy": f"{label}({share})",
        **{name: [share * 4 * size for size in sizes] for name in ("bytes", "union", "pairs")},
        "kl": [kl * size * (1 + index / 10) for index, size in enumerate(sizes)],
        "nll": [2 * size for size in sizes],
        "agree": sizes,
        "tokens": sizes,
        "changed_rows": 5 if kl else 0,
    }


def content(*settings: dict[str, Any]) -> dict[str, Any]:
    labels = dict.fromkeys(one["label"] for one in settings)
    return {
        "settings": {"series": [{"label": label, "control": label == "control"} for label in labels]},
        "model": {"layers": 2},
        "cells": [
            {
                "batch": 4,
                "domain": "all",
                "seed": 0,
                "layout": {"positions": 9, "prefill": 5},
                "rows": [setting("stock", 1.0, 0.0), *settings],
            }
        ],
    }


def test_ratios_at_equal_bytes() -> None:
    compare = module("compare")
    found = compare.cells(
        content(
            setting("ours", 0.25, 0.08), setting("ours", 0.75, 0.02),
            setting("good", 0.2, 0.16), setting("good", 0.7, 0.04),
            setting("bad", 0.2, 0.3), setting("bad", 0.8, 0.2),
            setting("control", 0.1, 1e-3), setting("control", 0.9, 1e-4),
        )
    )  # fmt: skip
    by_share = {cell.share: cell for cell in found}
    half = by_share[0.5]
    assert half.best == "good"
    expected = (0.08 * 0.02) ** 0.5 / (0.16 * (0.04 / 0.16) ** 0.6)
    assert half.ratio[0] == pytest.approx(expected)
    assert half.ratio[1] <= half.ratio[0] <= half.ratio[2]
    assert half.verdict == "win"
    assert by_share[0.2].verdict == "n/a", "ours does not reach so far"
    assert by_share[0.2].kl["ours"] is None
    assert by_share[0.9].best is None
    assert "n/a" in compare.table(found)
    (line,) = [line for line in compare.summary(found).splitlines() if line.startswith("| 4 | all |")]
    counts = [int(part) for part in line.split("|")[3:9]]
    assert counts == [8, 3, 0, 5, 0, 0]
    assert half.beaten_by("ours") == ["control"]
    reached = sum(0.25 <= share <= 0.75 for share in by_share)
    (row,) = [line for line in compare.controls_table(found).splitlines() if line.startswith("| ours |")]
    assert f"({reached} cells, **loses in {reached}**) |" in row
    over = [cell.over["ours"]["control"][0] for cell in found if "ours" in cell.over]
    assert f"| {np.prod(over) ** (1 / reached):.2f} (" in row
    assert half.over["ours"]["control"][0] == pytest.approx(0.04 / (1e-3 * 1e-4) ** 0.5)


def test_a_control_that_does_not_reach_beats_nobody() -> None:
    compare = module("compare")
    wide = [setting(label, s, 0.1) for label in ("ours", "good") for s in (0.1, 0.9)]
    found = compare.cells(content(*wide, setting("control", 0.1, 1e-3), setting("control", 0.35, 1e-3)))
    assert [bool(cell.beaten_by("good")) for cell in found] == [cell.share <= 0.35 for cell in found]


@pytest.mark.parametrize("settings", [1, 2, 5])
def test_interpolation_is_numpys_in_every_sample(settings: int) -> None:
    rng = np.random.default_rng(settings)
    x_RI, y_RI = np.sort(rng.random((20, settings)), axis=1), rng.normal(size=(20, settings))
    for share in (-0.1, 0.2, 0.5, 0.8, 1.1):
        twin = [np.interp(share, x, y) for x, y in zip(x_RI, y_RI, strict=True)]
        assert interpolated(share, x_RI, y_RI) == pytest.approx(np.array(twin))
    shares_R = rng.random(20)
    twin = [np.interp(share, x, y) for share, x, y in zip(shares_R, x_RI, y_RI, strict=True)]
    assert interpolated(shares_R, x_RI, y_RI) == pytest.approx(np.array(twin))


def test_variants_over_ours() -> None:
    compare = module("compare")
    made = content(*(setting(label, s, kl) for label, kl in (("ours", 0.1), ("half", 0.05)) for s in (0.3, 0.7)))
    shown = compare.variants_table(made, 4, (0.5, 0.9))
    assert "| ours | 1 | 1 |" in shown
    assert "| half | 0.50 [0.50, 0.50] | n/a |" in shown


def test_a_setting_that_changes_nothing_is_no_point_of_a_curve() -> None:
    compare = module("compare")
    made = content(setting("ours", 0.2, 0.3), setting("ours", 0.6, 0.1), setting("ours", 1.0, 0.0))
    reached = {cell.share for cell in compare.cells(made) if cell.kl["ours"] is not None}
    assert max(reached) == 0.6
    assert "`ours(1.0)`" in compare.settings_table(made, 4)


def test_few_batches_have_no_interval_and_no_verdict() -> None:
    compare = module("compare")
    two = [setting(label, s, kl, batches=9) for label, kl in (("ours", 0.1), ("good", 0.5)) for s in (0.2, 0.8)]
    made = content(*two)
    made["cells"][0]["rows"][0] = setting("stock", 1.0, 0.0, batches=9)
    cell = next(cell for cell in compare.cells(made) if cell.share == 0.5)
    assert cell.ratio == (pytest.approx(0.2), None, None)
    assert cell.verdict == compare.FEW == "too few batches"
    assert "| 4 | all | 8 | 1 | 7 | 0 | 0 | 0 |" in compare.summary(compare.cells(made))


def test_a_control_beats_a_method_only_beyond_the_scatter() -> None:
    compare = module("compare")
    near = [setting("control", s, 0.99 * kl) for s, kl in ((0.2, 0.2), (0.8, 0.1))]
    own = [setting("good", s, kl) for s, kl in ((0.2, 0.2), (0.8, 0.1))]
    for one in near:
        one["kl"] = (np.array(one["kl"]) * (1 + 0.1 * np.sin(np.arange(12.0)))).tolist()
    half = next(cell for cell in compare.cells(content(*own, *near)) if cell.share == 0.5)
    assert half.over["good"]["control"][0] > 1
    assert half.beaten_by("good") == []
    assert "cells, loses in none)" in compare.controls_table([half])
    few = [{**one, **{n: v[:9] for n, v in one.items() if isinstance(v, list)}} for one in (*own, *near)]
    made = content(*few)
    made["cells"][0]["rows"][0] = setting("stock", 1.0, 0.0, batches=9)
    assert "cells, too few batches)" in compare.controls_table(compare.cells(made))


def test_batches_of_several_seeds_have_no_interval() -> None:
    """They hold the same documents under another seed, so they are no independent ones."""
    compare = module("compare")
    two = [setting(label, s, kl) for label, kl in (("ours", 0.1), ("good", 0.5)) for s in (0.2, 0.8)]
    made = content(*two)
    made["cells"].append(made["cells"][0] | {"seed": 1})
    cell = next(cell for cell in compare.cells(made) if cell.share == 0.5)
    assert cell.ratio == (pytest.approx(0.2), None, None)
    assert cell.verdict == compare.FEW
    alone = next(cell for cell in compare.cells(content(*two)) if cell.share == 0.5)
    assert alone.verdict == "win"
    shown = [compare.settings_table(one, 4) for one in (made, content(*two))]
    assert shown[0] == shown[1]


def test_a_loss_is_a_loss() -> None:
    compare = module("compare")
    two = [setting("ours", s, 0.2 - s / 10) for s in (0.2, 0.8)] + [
        setting("good", s, 0.1 - s / 10) for s in (0.2, 0.8)
    ]
    verdicts = {cell.share: cell.verdict for cell in compare.cells(content(*two))}
    assert verdicts[0.5] == "loss"
    same = [setting(label, s, 0.2 - s / 10) for label in ("ours", "good") for s in (0.2, 0.8)]
    assert {cell.verdict for cell in compare.cells(content(*same)) if cell.ratio} == {"tie"}


def test_settings_are_shown_as_measured() -> None:
    shown = module("compare").settings_table(content(setting("ours", 0.5, 0.08)), 4)
    assert "| ours | `ours(0.5)` |" in shown
    assert "| 50% |" in shown


def test_committed_results_are_compared() -> None:
    compare, names = module("compare"), []
    for path in (LEADERBOARD / "results").rglob("*.json"):
        if '"kind": "carpool leaderboard"' in path.read_text():
            assert "| " in compare.page(compare.load(path)), path
            names.append(path.stem)
    assert {"frontier", "domains", "ablation", "checkpoints"} <= set(names)
