"""`carpool doctor --memory`: will it fit, and how fast at most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_doctor import QWEN3_30B, folder
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.cli.commands import app
from carpool.fit import estimates
from carpool.offloading.amounts import bytes_of


def test_what_fits_and_what_the_disk_allows(tmp_path: Path) -> None:
    found = estimates(folder(tmp_path, **QWEN3_30B), 8 << 30, 2_000_000_000)
    assert [one.bits for one in found] == [16, 6.5, 4.5, 3.5, 2.5]
    attention = 2048 * (32 * 128 * 2 + 4 * 128 * 2)
    rest = 2 * (48 * (attention + 128 * 2048 + 2 * 2048 + 2 * 128) + 2048 + 2 * 1000 * 2048)
    weights = 3 * 2048 * 768
    for one in found:
        assert one.rest == rest
        assert one.all_experts == pytest.approx(48 * 128 * weights * one.bits / 8)
        assert one.token == pytest.approx(one.all_experts / 16)
        assert one.resident == pytest.approx(min(1, ((8 << 30) - rest) / one.all_experts))
        assert one.most(0.75) == pytest.approx(2e9 / (one.token / 4))
    assert [one.fits for one in found] == [False] * 5
    assert estimates(tmp_path, 100 << 30, 1)[0].fits
    assert estimates(tmp_path, 1000, 1)[0].runs is False
    assert found[0].most(1.0) == float("inf")


def test_doctor_says_it(tmp_path: Path) -> None:
    model = str(folder(tmp_path, **QWEN3_30B))
    shown = CliRunner().invoke(app, ["doctor", model, "--memory", "8GiB", "--disk", "2GB/s"])
    assert shown.exit_code == 0, shown.output
    assert "Will it fit?" in shown.output
    found = json.loads(CliRunner().invoke(app, ["doctor", model, "--memory", "8GiB", "--json"]).output)["fit"]
    assert found[0]["bits"] == 16
    assert 0 < found[0]["resident"] < 1
    refused = CliRunner().invoke(app, ["doctor", model, "--memory", "8GiB", "--disk", "fast"])
    assert refused.exit_code == 2
    assert "give an amount above 0 with its unit, such as 2GB/s" in " ".join(refused.output.split())


def test_amounts() -> None:
    assert [bytes_of(one, "") for one in ("4GiB", "1.5 MB", "12B", 7)] == [4 << 30, 1_500_000, 12, 7]
    assert bytes_of("2GB/s", "", speed=True) == 2_000_000_000
    for wrong in ("4", "GiB", "-1GB", "0GB", "4GB/s", 0):
        with pytest.raises(CarpoolError, match="give an amount above 0"):
            bytes_of(wrong, "--memory")
