"""Energy statistics against loops over tokens, and what the predictor is for."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from carpool.calibrate.capture import Seen
from carpool.calibrate.easy_ep import EasyEP
from carpool.calibrate.energy import LEAST_NORM, RIDGE, Energy

N, E, K, H = 40, 6, 3, 5
DOMAINS = ("a", "b")


def measured(seed: int = 0) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator)
    scale_E = torch.rand(E, generator=generator) + 0.5
    outputs_NEH = torch.randn(N, E, H, generator=generator) * scale_E.view(1, E, 1)
    weights_NE = (torch.randn(N, E, generator=generator) * 2).softmax(-1)
    ids_NK = weights_NE.topk(K).indices
    ids_NK[ids_NK == 4] = 5  # nobody picks expert 4
    ids_NK = torch.stack([row.unique()[:2] for row in ids_NK])
    weights_NK = weights_NE.gather(1, ids_NK)
    residual_NH = torch.randn(N, H, generator=generator)
    domain_N = torch.randint(0, 2, (N,), generator=generator)
    return Seen(hidden_NH, outputs_NEH, ids_NK, weights_NK, residual_NH, domain_N, domain_N > 1)


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def twin(given: Seen) -> dict[str, list]:
    """Loops over tokens and experts."""
    hidden, outputs, ids, weights, residual, domain = (tensor.double().tolist() for tensor in given[:6])
    gate, norms, squares, weighted, count = ([0.0] * E for _ in range(5))
    score, covered = ([[0.0] * E for _ in DOMAINS] for _ in range(2))
    logs, ratios = [], []
    for n in range(N):
        routed = [sum(w * outputs[n][int(e)][h] for e, w in zip(ids[n], weights[n], strict=True)) for h in range(H)]
        after = [a + b for a, b in zip(residual[n], routed, strict=True)]
        cosine = sum(a * b for a, b in zip(residual[n], after, strict=True)) / (norm(residual[n]) * norm(after))
        for e, w in zip(map(int, ids[n]), weights[n], strict=True):
            length = norm(outputs[n][e])
            gate[e] += w
            norms[e] += length
            squares[e] += length**2
            weighted[e] += w * length
            count[e] += 1
            score[int(domain[n])][e] += w * length * max(0.0, 1 - cosine)
            covered[int(domain[n])][e] += 1
            logs.append(math.log(max(length, LEAST_NORM)))
        ratios.append([w / max(weights[n]) for w in sorted(weights[n], reverse=True)])
    inputs = np.array([[*row, 1.0] for row in hidden])
    strength = RIDGE * np.mean([sum(row[h] ** 2 for row in hidden) for h in range(H)])
    # ridge regression as least squares with H more rows
    padded = np.vstack([inputs, np.hstack([math.sqrt(strength) * np.eye(H), np.zeros((H, 1))])])
    targets = [[math.log(max(norm(outputs[n][e]), LEAST_NORM)) for e in range(E)] for n in range(N)]
    solved = np.linalg.lstsq(padded, np.vstack([np.array(targets), np.zeros((H, E))]), rcond=None)[0]
    deciles = [
        [sorted(round(row[j], 3) for row in ratios)[max(0, math.ceil(q * N / 10) - 1)] for q in range(11)]
        for j in range(len(ids[0]))
    ]
    return {
        "gate_sum": gate,
        "norm_mean": [a / max(1, c) for a, c in zip(norms, count, strict=True)],
        "norm_square_mean": [a / max(1, c) for a, c in zip(squares, count, strict=True)],
        "reap": [a / max(1, c) for a, c in zip(weighted, count, strict=True)],
        "easy_ep": [sum(own[e] / sum(own) for own in score) / len(DOMAINS) for e in range(E)],
        "easy_ep/a": [value / sum(score[0]) for value in score[0]],
        "easy_ep/b": [value / sum(score[1]) for value in score[1]],
        "coverage/a": covered[0],
        "coverage/b": covered[1],
        "norm_weight": solved[:H].T.tolist(),
        "norm_bias": solved[H].tolist(),
        "norm_scale": statistics.fmean(logs) + 3 * statistics.pstdev(logs),
        "ratio_quantiles": deciles,
        "coactivation": [[sum(a in row and b in row for row in ids) for b in range(E)] for a in range(E)],
        "l1_quantiles": np.quantile([sum(map(abs, row)) for row in hidden], np.linspace(0, 1, 101)).tolist(),
    }


def chunked(given: Seen, sizes: list[int]) -> dict[str, Tensor]:
    collectors = Energy(E, given.ids_NK.shape[1], H), EasyEP(E, DOMAINS)
    for part in zip(*(tensor.split(sizes) for tensor in given), strict=True):
        for collector in collectors:
            collector.update(Seen(*part))
    return collectors[0].result() | collectors[1].result()


@pytest.mark.parametrize("sizes", [[N], [1, 7, N - 8]])
def test_twin(sizes: list[int]) -> None:
    given = measured()
    result, expected = chunked(given, sizes), twin(given)
    assert set(result) == set(expected)
    for name, tensor in result.items():
        assert tensor.dtype == (torch.int64 if name.startswith(("coverage", "coactivation")) else torch.float32)
        # a ratio on the edge of two bins may fall into either
        close = 1.1e-3 if name == "ratio_quantiles" else 1e-5
        assert torch.allclose(tensor.double(), torch.tensor(expected[name]).double(), rtol=1e-4, atol=close), name


def test_without_the_residual_stream_there_is_no_easy_ep() -> None:
    scores = EasyEP(E, DOMAINS)
    scores.update(measured())
    scores.update(measured()._replace(residual_NH=None))
    assert set(scores.result()) == {"coverage/a", "coverage/b"}


def test_the_predictor_finds_a_linear_law() -> None:
    """Outputs whose log norm is linear in the input, and one expert that is always silent."""
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(400, H, generator=generator)
    law_HE, offset_E = torch.randn(H, E, generator=generator) / 3, torch.randn(E, generator=generator)
    outputs_NEH = torch.nn.functional.normalize(torch.randn(400, E, H, generator=generator), dim=-1)
    outputs_NEH = outputs_NEH * (hidden_NH @ law_HE + offset_E).exp().unsqueeze(-1)
    outputs_NEH[:, 3] = 0
    energy = Energy(E, 1, H)
    ids_N1 = torch.zeros(400, 1, dtype=torch.int64)
    energy.update(Seen(hidden_NH, outputs_NEH, ids_N1, torch.ones(400, 1), None, ids_N1[:, 0], ids_N1[:, 0] > 0))
    result = energy.result()
    heard = [0, 1, 2, 4, 5]
    assert torch.allclose(result["norm_weight"][heard], law_HE.T[heard], atol=5e-3)
    assert torch.allclose(result["norm_bias"][heard], offset_E[heard], atol=5e-3)
    assert result["norm_weight"].isfinite().all()


def test_calibration_gives_what_base_needs() -> None:
    """On a real layer: the predictor foresees the logarithm of output norms better than a constant does."""
    from tiny_models import tiny_model

    from carpool import parse, share
    from carpool.calibrate import calibrate
    from carpool.calibrate.capture import Experts, capture
    from carpool.hosts.transformers import find_layers

    model = tiny_model("qwen3_moe").eval()
    layers = find_layers(model)
    ids_BT = torch.randint(3, 64, (32, 32), generator=torch.Generator().manual_seed(0))
    stats = calibrate(model, layers, ids_BT, energy=True)
    for name in parse("base(4)").policy.required_stats():
        assert name in stats.for_layer(layers[0].index)
    with torch.inference_mode():
        routed = capture(model, layers, ids_BT[:8])[1]
        experts = Experts(layers[1])
        with experts.ready() as run:
            log_NE = torch.stack([out_NH.norm(dim=-1).log() for out_NH in experts.each(run, routed.hidden_NH)], dim=1)
    found = stats.for_layer(layers[1].index)
    error_NE = routed.hidden_NH @ found["norm_weight"].T + found["norm_bias"] - log_NE
    assert error_NE.var() < 0.9 * (log_NE - log_NE.mean(0)).var()
    with share(model, "base(budget=3)", group="batch", stats=stats), torch.inference_mode():
        model.generate(ids_BT[:4, :4], max_new_tokens=3, do_sample=False)
