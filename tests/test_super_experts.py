"""Super experts: found where one is planted, nowhere else, and read deep by the policies that choose depths."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from layer_statistics import planes
from tiny_models import tiny_model

from carpool import Batch, RouteSpec, parse, route
from carpool.calibrate.compress import compress
from carpool.calibrate.super_experts import stream_peaks, super_experts
from carpool.hosts.transformers import find_layers

PLANTED = 3


def measured(planted: bool) -> dict[int, dict[str, torch.Tensor]]:
    """The statistics of a tiny model; an expert of its first layer may put out one huge number."""
    model = tiny_model("qwen3_moe")
    layers = find_layers(model)
    if planted:
        with torch.no_grad():
            layers[0].experts.down_proj[PLANTED, 5] = 3e4
    ids_BT = torch.randint(3, 64, (10, 32), generator=torch.Generator().manual_seed(0))
    held_B = torch.arange(10) % 5 == 1
    return compress(model, layers, ids_BT, held_B, depths=(2, 4), group=16, method="round")


def test_a_planted_one_is_found_and_no_other() -> None:
    found = {index: one["depth_super"].tolist() for index, one in measured(True).items()}
    assert found == {0: [expert == PLANTED for expert in range(8)], 1: [False] * 8}
    assert not any(one["depth_super"].any() for one in measured(False).values())


def test_the_criterion_by_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    peaks = {index: torch.rand(64, generator=generator).exp() for index in range(4)}
    for place, (index, expert) in enumerate(((1, 7), (2, 4), (3, 0), (1, 9))):
        peaks[index][expert] = 500.0 - place
    streams = {
        0: torch.tensor([10.0, 20]), 1: torch.tensor([20.0, 5000]), 2: torch.tensor([5000.0, 5100]),
        3: torch.tensor([10.0, 900]),
    }  # fmt: skip
    every = sorted(float(one) for peak_E in peaks.values() for one in peak_E)
    place = 0.995 * 255
    least = every[int(place)] + (every[int(place) + 1] - every[int(place)]) * (place - int(place))
    for index, found_E in super_experts(peaks, streams).items():
        for expert, found in enumerate(found_E.tolist()):
            peak, (before, after) = float(peaks[index][expert]), streams[index].tolist()
            rising = after >= 1000 and after >= 2 * before
            assert found == (peak > least and peak > every[-1] / 10 and rising), (index, expert)
    assert super_experts(peaks, streams)[1].nonzero().flatten().tolist() == [7]


def test_stream_peaks() -> None:
    generator = torch.Generator().manual_seed(2)
    before_NH, added_NH = (torch.randn(5, 3, generator=generator) for _ in range(2))
    after = [abs(a + b) for a, b in zip(before_NH.flatten().tolist(), added_NH.flatten().tolist(), strict=True)]
    before = [abs(a) for a in before_NH.flatten().tolist()]
    expected = [max(before) / median(before), max(after) / median(after)]
    assert stream_peaks(before_NH, added_NH).tolist() == pytest.approx(expected, rel=1e-5)
    assert stream_peaks(None, added_NH).tolist() == [0, 0]


@pytest.mark.parametrize("text", ["depth(price=1.0)", "depth(bytes=0.2)", "depth(budget=1)", "bit_plan(bits=2.5)"])
def test_whoever_uses_it_reads_it_deep(text: str) -> None:
    """An expert of next to no energy, which would be read shallow or left out."""
    stats = planes(8, torch.Generator().manual_seed(0))
    stats["depth_energy"][PLANTED] = 1e-6
    plan, logits_NE = parse(text), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    logits_NE[0, PLANTED] = 9.0
    depths = []
    for outliers in ([], [PLANTED]):
        stats["depth_super"] = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(outliers).long(), True)
        outcome = route(plan, RouteSpec(top_k=2), logits_NE, Batch.of(4), stats=plan.prepare(stats))
        depth_GE = plan.policy.read_depth(outcome.inputs)
        assert depth_GE is not None
        depths.append(int(depth_GE[0, PLANTED]))
    assert depths[0] < depths[1] == 4
