"""Files and calibration where another default device is set than the one that they work on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_held_out import Numbers, told
from test_identity import weights
from test_statistics import LAYERS, statistics
from tiny_models import tiny_model, tokens

from carpool.artefacts.identity import Held, differs, sample
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import Document
from carpool.calibrate import calibrate, token_sequences
from carpool.calibrate.sensitivity import sensitivity
from carpool.calibrate.surrogate_fit import SurrogateFit
from carpool.experts.surrogates import stored_part
from carpool.hosts.transformers import find_layers, identity


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device whose tensors mix with no others."""
    with torch.device("meta"):
        yield


def test_statistics_are_read_and_compared(tmp_path: Path, elsewhere: None) -> None:
    with torch.device("cpu"):
        statistics().save(tmp_path / "s.safetensors")
        into, out = weights()
        whole = sample(0, Held(into, out, out.shape[2])).tensors
        fitted = {"surrogate_in": torch.ones(2, 3, 4), "surrogate_out": torch.ones(2, 4, 4)}
    assert set(Statistics.load(tmp_path / "s.safetensors").layers) == set(LAYERS)
    assert not differs(whole, sample(0, Held(into, out, out.shape[2])))
    assert [list(stored_part(fitted, rank, 2)["surrogate_out"].shape) for rank in range(2)] == [[2, 3, 4], [2, 2, 4]]


def test_calibration(elsewhere: None) -> None:
    with torch.device("cpu"):
        model, ids_BT = tiny_model("qwen3_moe"), tokens(16, 24)
        expected = calibrate(model, find_layers(model), ids_BT, energy=True)
    layers = find_layers(model)
    fit = [lambda layer: SurrogateFit(layer, 2)]
    found = calibrate(model, layers, ids_BT, energy=True, collectors=fit)
    for index, tensors in expected.layers.items():
        for name, tensor in tensors.items():
            assert torch.equal(found.layers[index][name], tensor)
    assert not found.check(identity(layers))
    assert all(tensors["sensitivity"].item() > 0 for tensors in sensitivity(model, layers, ids_BT).values())
    made = token_sequences([Document("a", told(1, 900))], Numbers(), 900, 16, 0, hold_out=True)
    assert {made.ids_BT.device.type, made.held_B.device.type} == {"cpu"}
