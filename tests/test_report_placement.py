"""Devices by experts in `carpool report`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from placement_tools import random_trace
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.cli.commands import app
from carpool.placement.baselines import linear
from carpool.placement.demand import loads_LE
from carpool.placement.eplb import eplb
from carpool.placement.placement_file import PlacementFile
from carpool.report.experts_placed import placement_section, shares_DS

pytest.importorskip("plotly")


def test_the_picture_holds_every_slot_before_and_after() -> None:
    trace = random_trace(96, 2, 8, 2, seed=2, skew=2.0)
    load_LE = loads_LE(trace)
    placement = eplb(load_LE, 4, redundant=4)
    html = placement_section(PlacementFile(placement, (1, 3)), trace)
    specs = [json.loads(one) for one in re.findall(r"<script type='application/json'>(.*?)</script>", html, re.DOTALL)]
    assert len(specs) == 2
    assert "layer 3" in html
    assert "96 tokens of the trace, eplb in place of experts in order" in html
    for layer, spec in enumerate(specs):
        for shown, drawn in ((linear(2, 8, 4), spec["data"][0]), (placement, spec["data"][1])):
            assert drawn["text"] == shown.expert_LDS[layer].tolist()
            z_DS = torch.tensor(drawn["z"], dtype=torch.float64)
            assert torch.allclose(z_DS, shares_DS(shown, layer, load_LE[layer]))
            assert float(z_DS.sum()) == pytest.approx(1)
    with pytest.raises(CarpoolError, match="the placement is of 2 layers"):
        placement_section(PlacementFile(placement, (1, 3)), random_trace(layers=3))


def test_a_plan_needs_its_trace(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["report", "results.json", "--placement", "placement.json", "-o", str(tmp_path / "r.html")]
    )
    assert done.exit_code == 2
    assert "--placement and --trace go together" in " ".join(done.output.split())
