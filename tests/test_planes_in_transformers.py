"""Checkpoints in planes in transformers: the kernels compute their experts, which are never weights."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_matrix import forward
from test_compressed_checkpoints import logits, made
from test_transformers_loading import save
from tiny_models import FAMILIES, MORE, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import carpool
import carpool.hosts.transformers.quantizer  # makes planes known to from_pretrained
from carpool import CarpoolError
from carpool.artefacts.statistics import Statistics
from carpool.calibrate.moments import Projections
from carpool.experts.rounding import nested_round
from carpool.experts.stored import NAMES, StoredExperts
from carpool.hosts.transformers import find_layers, load_model, open_model
from carpool.hosts.transformers.planes import PlanesExperts, activation_of
from carpool.kernels.experts import build

DEPTHS, GROUP = (2, 4), 32
needs_kernels = pytest.mark.skipif(not build.ready(), reason="no C++ compiler or ninja")


def at_depth(model: Any, depth: int) -> Any:
    """A copy whose experts are usual weights, rounded as they are read at a depth."""
    model = copy.deepcopy(model)
    for layer in find_layers(model):
        for name, weight in rounded(layer).weights(layer.experts, depth).items():
            layer.experts.get_parameter(name).data.copy_(weight)
    return model


def rounded(layer: Any) -> StoredExperts:
    held = Projections(layer)
    return StoredExperts(nested_round(held.into_ERH, DEPTHS, GROUP), nested_round(held.out_EHI, DEPTHS, GROUP))


def in_planes(model: Any, kernels: bool) -> Any:
    model = copy.deepcopy(model)
    for layer in find_layers(model):
        activation = activation_of(layer.experts)
        assert activation is not None
        planes = PlanesExperts(layer.experts, activation)
        planes.fill(rounded(layer).tensors(), torch.device("cpu"), kernels=kernels)
        layer.block.experts = planes
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)])
def test_every_family_computes_what_its_own_experts_do(family: str) -> None:
    model = tiny_model(family)
    if any(activation_of(layer.experts) is None for layer in find_layers(model)):
        assert family in MORE
        pytest.skip("an activation that no kernel knows: its experts become usual weights")
    found, wanted = forward(in_planes(model, kernels=False)), forward(at_depth(model, 4))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@functools.cache
def folder(tmp: Path) -> Path:
    source = save(tmp / "source", tiny_model("qwen3_moe"))
    made(source, tmp / "planes", "planes", DEPTHS, GROUP)
    return tmp / "planes"


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("planes"))


@needs_kernels
def test_off_exempt_and_the_deepest_depth_are_the_same_bits(planes: Path) -> None:
    model, _ = load_model(planes)
    ids = tokens(4, 9)
    stock = logits(model, ids)
    with carpool.share(model, "depth(bytes=0.2)"):
        assert torch.equal(logits(model, ids), stock)  # a prompt
    with carpool.share(model, "topk(k=2) | bits(4)", exempt_prefill=False, group="request"):
        assert torch.equal(logits(model, ids), stock)
    with carpool.share(model, "depth(bytes=0.1)", exempt_prefill=False) as run:
        assert not torch.allclose(logits(model, ids), stock, atol=1e-3)
    assert run.summary().bytes_read < run.summary().bytes_natively
    assert torch.equal(logits(model, ids), stock)


@needs_kernels
@pytest.mark.parametrize("plan", ["topk(k=2) | bits(2)", "depth(bytes=0.2)", "hobbit(high=4, low=2)"])
def test_the_kernels_are_close_to_plain_torch(planes: Path, plan: str) -> None:
    model, ids = load_model(planes)[0], tokens(4, 9)
    plain = copy.deepcopy(model)
    for layer, tensors in zip(
        find_layers(plain), Statistics.load(planes / "experts.planes").layers.values(), strict=True
    ):
        layer.experts.fill(tensors, torch.device("cpu"), kernels=False)
    found = []
    for one in (model, plain):
        with carpool.share(one, plan, exempt_prefill=False, group="request"):
            found.append(logits(one, ids))
    assert 1e-6 < error(*found) < 0.05  # 8 bits of activations
    assert error(found[0], logits(plain, ids)) > 2 * error(*found)


def test_experts_are_never_weights(planes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("an expert became a weight")

    monkeypatch.setattr(StoredExperts, "weights", never)
    model, _ = load_model(planes, dtype=torch.bfloat16)
    assert not [name for name, one in model.named_parameters() if one.dim() > 2]
    assert not [one for one in model.modules() if "Qwen3MoeExperts" in type(one).__name__]
    found = model.generate(tokens(2, 5), max_new_tokens=3, do_sample=False)
    with carpool.share(model, "depth(bytes=0.1)") as run:
        model.generate(tokens(2, 5), max_new_tokens=3, do_sample=False)
    assert found.shape == (2, 8)
    assert run.changed_rows() > 0 or run.summary().bytes_read < run.summary().bytes_natively


def test_from_pretrained_loads_them_too(planes: Path) -> None:
    ids = tokens(2, 7)
    model = AutoModelForCausalLM.from_pretrained(planes, variant="carpool", dtype=torch.float32).eval()
    assert torch.equal(logits(model, ids), logits(load_model(planes)[0], ids))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(planes / "again")


def test_usual_weights_are_what_calibration_looks_at(planes: Path) -> None:
    ids = tokens(2, 7)
    usual = open_model(planes).weights(usual=True)
    assert usual.model.layers[0].mlp.experts.gate_up_proj.dim() == 3
    assert error(logits(load_model(planes)[0], ids), logits(usual, ids)) < 0.05


def test_depths_that_the_model_lacks_are_refused(planes: Path) -> None:
    model, _ = load_model(planes)
    stats = Statistics.load(planes / "experts.planes", NAMES)
    shape = torch.tensor([GROUP, 32, 16, 2, 3])
    other = replace(stats, layers={index: {**one, "planes_shape": shape} for index, one in stats.layers.items()})
    with (
        pytest.raises(CarpoolError, match="at 3 bits, by the statistics"),
        carpool.share(model, "depth(bytes=0.2)", stats=other),
    ):
        pass


def test_experts_stay_on_their_device(planes: Path) -> None:
    model, _ = load_model(planes)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(CarpoolError, match="device_map"):
        model.to("meta")
