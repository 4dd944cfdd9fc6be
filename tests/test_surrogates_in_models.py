"""Surrogates from fit to forward pass: against direct regression, beside a model's experts, and what they count."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor

import carpool
from carpool import Batch, CarpoolError, Outcome, parse
from carpool.artefacts.statistics import Statistics
from carpool.calibrate import calibrate
from carpool.calibrate.capture import Seen
from carpool.calibrate.surrogate_fit import RIDGE, SurrogateFit, solve, stored
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS, forward
from carpool.experts.surrogates import NAMES, Surrogates, by_pairs
from carpool.hosts.transformers import attach, find_layers
from carpool.routing.batch import Grouping

RANK = 4
PLAN = "surrogate(budget=2, warmup=0)"


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Statistics]:
    """A tiny model and its statistics; random experts are not linear at all, so the file is made to say otherwise."""
    model = tiny_model("qwen3_moe")
    ids_BT = torch.randint(0, model.config.vocab_size, (24, 128), generator=torch.Generator().manual_seed(3))
    stats = calibrate(model, find_layers(model), ids_BT, collectors=[lambda layer: SurrogateFit(layer, RANK)])
    good = {"surrogate_unexplained": torch.full((find_layers(model)[0].num_experts,), 0.5)}
    return model, replace(stats, layers={index: {**tensors, **good} for index, tensors in stats.layers.items()})


def sums(x_NH: Tensor, y_NH: Tensor) -> tuple[Tensor, Tensor]:
    x_ND = torch.nn.functional.pad(x_NH, (0, 1), value=1.0)
    return x_ND.T @ x_ND, x_ND.T @ y_NH


def noisy_line(seed: int = 0, rows: int = 200, H: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_NH = torch.randn(rows, H, generator=generator, dtype=torch.float64) + 1
    map_HH = torch.randn(H, H, generator=generator, dtype=torch.float64)
    noise_NH = torch.randn(rows, H, generator=generator, dtype=torch.float64)
    return x_NH, x_NH @ map_HH + 0.5 + noise_NH / 10


def test_rank_0_is_the_mean_output() -> None:
    """MoNE's constant, in all ways to compute it."""
    x_NH, y_NH = noisy_line()
    inner_RH, outer_XH = solve(*sums(x_NH, y_NH), rank=0)
    assert inner_RH.shape == (0, 6)
    torch.testing.assert_close(outer_XH, y_NH.mean(0, keepdim=True))
    tensors = stored({NAMES[0]: inner_RH.expand(2, 0, 6), NAMES[1]: torch.stack([outer_XH, 2 * outer_XH])}, "fp32")
    surrogates = Surrogates.of(tensors)
    assert surrogates.rank == 0
    ids_NX, weights_NX = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.5, 0.0], [0.25, 0.5]])
    expected_NH = torch.stack([0.5 * y_NH.mean(0), y_NH.mean(0)]).float()
    torch.testing.assert_close(surrogates(x_NH[:2], ids_NX, weights_NX), expected_NH)
    parts = (tensors[name].float() for name in NAMES)
    torch.testing.assert_close(by_pairs(x_NH[:2], ids_NX, weights_NX, *parts), expected_NH)


def test_full_rank_is_ridge_regression() -> None:
    x_NH, y_NH = noisy_line()
    inner_RH, outer_XH = solve(*sums(x_NH, y_NH), rank=6)
    centred_NH, target_NH = x_NH - x_NH.mean(0), y_NH - y_NH.mean(0)
    strength = RIDGE * centred_NH.square().sum(0).mean()
    gram_HH = centred_NH.T @ centred_NH + strength * torch.eye(6, dtype=torch.float64)
    direct_HH = torch.linalg.solve(gram_HH, centred_NH.T @ target_NH)
    torch.testing.assert_close(inner_RH.T @ outer_XH[:-1], direct_HH)
    torch.testing.assert_close(outer_XH[-1], y_NH.mean(0) - x_NH.mean(0) @ direct_HH)


def test_a_lower_rank_is_the_best_of_its_rank() -> None:
    """No step from the solution, whatever its direction, lowers the penalised error."""
    x_NH, y_NH = noisy_line(1)
    inner_RH, outer_XH = solve(*sums(x_NH, y_NH), rank=2)
    centred_NH, target_NH = x_NH - x_NH.mean(0), y_NH - y_NH.mean(0)
    strength = RIDGE * centred_NH.square().sum(0).mean()

    def loss(inner: Tensor, outer: Tensor) -> float:
        map_HH = inner.T @ outer
        return float((target_NH - centred_NH @ map_HH).square().sum() + strength * map_HH.square().sum())

    best, generator = loss(inner_RH, outer_XH[:-1]), torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            steps = [
                size * torch.randn(part.shape, generator=generator, dtype=torch.float64)
                for part in (inner_RH, outer_XH[:-1])
            ]
            assert loss(inner_RH + steps[0], outer_XH[:-1] + steps[1]) >= best


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_inputs_that_hardly_vary(rows: int) -> None:
    """Fewer tokens than numbers, large means, sums in fp32."""
    x_NH = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0)) * 1e-3 + 50
    inner_RH, outer_XH = solve(*sums(x_NH, x_NH[:, :8].repeat(1, 4)), rank=3)
    assert inner_RH.isfinite().all()
    assert outer_XH.isfinite().all()


@pytest.mark.parametrize(("how", "error"), [("int8", 1e-2), ("bf16", 1e-2), ("fp32", 1e-6)])
def test_storage(how: str, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = {
        "surrogate_in": torch.randn(3, 2, 16, generator=generator),
        "surrogate_out": torch.randn(3, 3, 16, generator=generator),
    }
    kept = Surrogates.of(stored(exact, how))
    for name, found in (("surrogate_in", kept.in_XH), ("surrogate_out", kept.out_XH)):
        wanted = exact[name][:, :2].flatten(0, 1)
        assert (found - wanted).abs().max() <= error * wanted.abs().max()
    assert kept.bytes == {"int8": 5 * 16 + 5 * 4, "bf16": 5 * 16 * 2, "fp32": 5 * 16 * 4}[how]


class Bent(torch.nn.Module):
    """Experts that are nearly linear."""

    def __init__(self, E: int, H: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.maps_EHH = torch.nn.Parameter(torch.randn(E, H, H, generator=generator))

    def forward(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        outputs_NKH = torch.einsum("nh,nkhi->nki", hidden_NH, self.maps_EHH[ids_NK])
        return ((outputs_NKH + outputs_NKH.abs() / 2 + 1) * weights_NK.unsqueeze(-1)).sum(1)


def test_the_measure_is_the_error_on_tokens_that_the_fit_did_not_see() -> None:
    """Nobody picks the last expert."""
    E, H, rows = 4, 8, 100
    layer: Any = SimpleNamespace(index=0, num_experts=E, weight_EH=torch.zeros(E, H), experts=Bent(E, H))
    fit, generator = SurrogateFit(layer, 3), torch.Generator().manual_seed(0)

    def chunk() -> Seen:
        hidden_NH = torch.randn(rows, H, generator=generator)
        every = [layer.experts(hidden_NH, torch.full((rows, 1), e), torch.ones(rows, 1)) for e in range(E)]
        ids_NK = torch.rand(rows, E - 1, generator=generator).topk(2).indices
        zero_N = torch.zeros(rows, dtype=torch.int64)
        held_N = torch.arange(rows) % 5 == 4
        return Seen(hidden_NH, torch.stack(every, 1).double(), ids_NK, torch.ones(rows, 2), None, zero_N, held_N)

    with torch.no_grad():
        for _ in range(40):
            fit.update(chunk())
        made = fit.result()
        test = chunk()
    found = Surrogates.of(made)
    assert made["surrogate_unexplained"][-1] == 1
    assert not made["surrogate_out"][-1].any()
    for expert in range(E - 1):
        one = torch.full((rows, 1), expert), torch.ones(rows, 1)
        y_NH = test.outputs_NEH[:, expert].float()
        left = float((y_NH - found(test.hidden_NH, *one)).square().sum() / y_NH.square().sum())
        assert 0.05 < left < 0.9
        assert float(made["surrogate_unexplained"][expert]) == pytest.approx(left, abs=0.05)
        assert float(made["surrogate_energy"][expert]) == pytest.approx(float(y_NH.square().sum(-1).mean()), rel=0.3)


def test_refusals() -> None:
    layer = find_layers(tiny_model("qwen3_moe"))[0]
    with pytest.raises(CarpoolError, match="rank -1"):
        SurrogateFit(layer, -1)
    with pytest.raises(CarpoolError, match="'int3'"):
        SurrogateFit(layer, 2, "int3")
    with pytest.raises(CarpoolError, match="raise --tokens"):
        SurrogateFit(layer, 2).result()


def test_the_host_adds_what_surrogates_give(fitted: tuple[Any, Statistics]) -> None:
    """The experts' output and what comes out of their module differ by the loop over displaced pairs."""
    model, stats = fitted
    layers, seen, before, after = find_layers(model), {}, {}, {}
    early = [layer.experts.register_forward_hook(_keeper(before, i)) for i, layer in enumerate(layers)]
    attach(model)
    late = [layer.experts.register_forward_hook(_keeper(after, i)) for i, layer in enumerate(layers)]
    try:
        with carpool.share(model, PLAN, stats=stats, exempt_prefill=False, observe=_observer(seen)), torch.no_grad():
            model(input_ids=tokens())
    finally:
        for handle in (*early, *late):
            handle.remove()
    for position, layer in enumerate(layers):
        tensors, routing = stats.for_layer(layer.index), seen[position].routing
        inner, outer = (
            tensors[name].float() * tensors[f"{name}_scale"].unsqueeze(-1) for name in ("surrogate_in", "surrogate_out")
        )
        hidden_NH, experts_NH = before[position]
        pairs = 0
        for row in range(len(hidden_NH)):
            expected_H = experts_NH[row].clone()
            for expert, weight in zip(routing.surrogate_ids_NK[row], routing.surrogate_weights_NK[row], strict=True):
                expected_H += weight * (outer[expert][:-1].T @ (inner[expert] @ hidden_NH[row]) + outer[expert][-1])
                pairs += int(weight != 0)
            torch.testing.assert_close(after[position][1][row], expected_H)
        assert pairs > 0


def _keeper(kept: dict[int, tuple[Tensor, Tensor]], position: int) -> Any:
    def hook(module: Any, args: tuple, output: Tensor) -> None:
        kept[position] = (args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]))

    return hook


def _observer(seen: dict[int, Outcome]) -> Any:
    return lambda layer, batch, outcome: seen.__setitem__(layer, outcome)


def test_nothing_displaced_is_stock_bit_for_bit(fitted: tuple[Any, Statistics]) -> None:
    model, stats = fitted
    with torch.no_grad():
        stock = model(input_ids=tokens()).logits
        with carpool.share(model, "surrogate(1.0)", stats=stats, exempt_prefill=False):
            assert torch.equal(model(input_ids=tokens()).logits, stock)
        with carpool.share(model, PLAN, stats=stats, exempt_prefill=False):
            assert not torch.equal(model(input_ids=tokens()).logits, stock)


def test_experts_that_are_bypassed_are_noticed(fitted: tuple[Any, Statistics]) -> None:
    model, stats = fitted
    block = find_layers(model)[0].block
    given = block.forward
    block.forward = lambda hidden: (block.gate(hidden.reshape(-1, hidden.shape[-1])), hidden)[1]
    try:
        with (
            pytest.raises(CarpoolError, match="did not call its experts"),
            torch.no_grad(),
            carpool.share(model, PLAN, stats=stats, exempt_prefill=False),
        ):
            model(input_ids=tokens())
    finally:
        block.forward = given


def test_statistics_without_surrogates(fitted: tuple[Any, Statistics]) -> None:
    model, stats = fitted
    kept = {index: {n: t for n, t in layer.items() if n != "surrogate_in"} for index, layer in stats.layers.items()}
    with (
        pytest.raises(CarpoolError, match="--surrogates"),
        carpool.share(model, PLAN, stats=replace(stats, layers=kept)),
    ):
        pass


def test_bytes_are_counted_in_experts(fitted: tuple[Any, Statistics]) -> None:
    model, stats = fitted
    layout = Layout(4, 6, 2, Grouping.parse("position"))
    ids_ST = torch.randint(0, model.config.vocab_size, (8, 6), generator=torch.Generator().manual_seed(5))
    found: dict[int, Outcome] = {}
    layers = find_layers(model)

    def see(layer: int, batch: Batch, outcome: Outcome) -> None:
        found[layer] = outcome

    run = forward(model, parse(PLAN), ids_ST, layout, num_layers=len(layers), stats=stats, observe=see)
    for position, layer in enumerate(layers):
        routing, batch = found[position].routing, found[position].inputs.batch
        used: dict[int, set[int]] = {}
        for row, step in enumerate(batch.step_N.tolist()):
            for expert, weight in zip(routing.surrogate_ids_NK[row], routing.surrogate_weights_NK[row], strict=True):
                if weight:
                    used.setdefault(step, set()).add(int(expert))
        H, width = model.config.hidden_size, model.config.moe_intermediate_size
        expert_bytes = 3 * H * width * 2  # fp32 weights count as 16 bits
        size = (2 * RANK + 1) * (H + 4)
        sums_FM = run.layers_LFM[position]
        read = sum(map(len, used.values()))
        assert float(sums_FM[LAYER_FIELDS.index("surrogates")].sum()) == read
        union = float(sums_FM[LAYER_FIELDS.index("union")].sum())
        assert float(sums_FM[LAYER_FIELDS.index("bytes")].sum()) == pytest.approx(union + read * size / expert_bytes)
        assert layer.num_experts > 2
