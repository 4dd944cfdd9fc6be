"""Confidence signals and the gate: bounds, monotony, and that it refuses what is no better than chance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool import CarpoolError
from carpool.models.confidence import SIGNALS, answer_least, answer_mean
from carpool.models.gate import Gate, isotonic

every_signal = pytest.mark.parametrize("signal", SIGNALS.values(), ids=list(SIGNALS))
some_logits = st.tuples(st.integers(0, 999), st.integers(2, 9), st.sampled_from([0.1, 1.0, 20.0]))


def drawn(seed: int, classes: int, scale: float, rows: int = 6) -> torch.Tensor:
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale).softmax(-1)


@every_signal
@given(classes=st.integers(2, 40))
def test_nothing_known_is_0_and_no_doubt_is_1(signal, classes: int) -> None:
    p_NV = torch.stack([torch.full((classes,), 1 / classes), torch.eye(classes)[0]])
    assert signal(p_NV).tolist() == pytest.approx([0, 1], abs=1e-6)


@every_signal
@given(how=some_logits)
def test_the_order_of_classes_is_no_matter(signal, how) -> None:
    p_NV = drawn(*how)
    value_N = signal(p_NV)
    assert ((value_N >= 0) & (value_N <= 1)).all()
    torch.testing.assert_close(signal(p_NV.flip(-1)), value_N, atol=1e-9, rtol=0)


@every_signal
@given(how=some_logits)
def test_more_of_the_uniform_is_less_sure(signal, how) -> None:
    p_NV = drawn(*how)
    assert (signal(0.7 * p_NV + 0.3 / how[1]) <= signal(p_NV) + 1e-9).all()


def test_probabilities_are_asked_for() -> None:
    """A second softmax, the official code's slip, would go unseen where logits are taken too."""
    for p_NV, said in ((torch.tensor([[2.0, -1.0]]), "no probabilities"), (torch.ones(3, 1), "1 classes")):
        with pytest.raises(CarpoolError, match=said):
            SIGNALS["variance"](p_NV)


def test_an_answer_is_no_surer_for_being_short() -> None:
    logprobs_NT = torch.tensor([[0.5, 0.5, 0.9], [0.5, 1.0, 0.9]]).log()
    span_NT = torch.tensor([[True, True, False], [True, False, False]])
    assert answer_mean(logprobs_NT, span_NT).tolist() == pytest.approx([0.5, 0.5])
    assert answer_least(logprobs_NT, span_NT).tolist() == pytest.approx([0.5, 0.5])
    assert (
        answer_mean(logprobs_NT, span_NT & False).tolist()
        == answer_least(logprobs_NT, span_NT & False).tolist()
        == [0, 0]
    )


def items(seed: int, count: int = 400, signals: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signals that say how likely the weak model is right (noise in all but the first), and what was right."""
    generator = torch.Generator().manual_seed(seed)
    signals_NS = torch.rand(count, signals, generator=generator, dtype=torch.float64)
    weak_N = torch.rand(count, generator=generator) < signals_NS[:, 0]
    return signals_NS, weak_N, torch.rand(count, generator=generator) < 0.9


def test_a_signal_that_tells_is_used() -> None:
    signals_NS, weak_N, strong_N = items(0)
    gate = Gate.calibrate(signals_NS, weak_N, strong_N, max_loss=0.02)
    kept_N = gate.keep(signals_NS)
    assert 0.1 < gate.kept < 0.9
    assert gate.kept == pytest.approx(float(kept_N.double().mean()))
    lost = (strong_N.double() - weak_N.double())[kept_N].sum() / len(weak_N)
    assert gate.loss == pytest.approx(float(lost))
    assert gate.loss <= 0.02
    fresh_NS, weak_N, strong_N = items(1, 4000)
    kept_N = gate.keep(fresh_NS)
    mixed = torch.where(kept_N, weak_N, strong_N).double().mean()
    chance = kept_N.double().mean() * weak_N.double().mean() + (~kept_N).double().mean() * strong_N.double().mean()
    assert mixed > chance + 0.02


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_share_may_be_given_instead(share: float) -> None:
    gate = Gate.calibrate(*items(2), max_cost=share)
    assert 1 - gate.kept == pytest.approx(share, abs=0.01)


def test_a_budget_may_count_tokens() -> None:
    signals_NS, weak_N, strong_N = items(5)
    tokens_N = torch.randint(5, 50, (400,), generator=torch.Generator().manual_seed(5))
    gate = Gate.calibrate(signals_NS, weak_N, strong_N, max_cost=10, cost_N=tokens_N)
    spent = float((tokens_N * ~gate.keep(signals_NS)).double().mean())
    assert 9 < spent <= 10
    fresh_NS, _, _ = items(6, 4000)
    fresh_N = torch.randint(5, 50, (4000,), generator=torch.Generator().manual_seed(6))
    assert float((fresh_N * ~gate.keep(fresh_NS)).double().mean()) == pytest.approx(10, abs=1.5)
    with pytest.raises(CarpoolError, match="enough for every item"):
        Gate.calibrate(signals_NS, weak_N, strong_N, max_cost=60, cost_N=tokens_N)


@given(seed=st.integers(0, 99), signals=st.sampled_from([1, 3]))
def test_confidence_rises_with_every_signal(seed: int, signals: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = GATES[signals]
    signals_NS = torch.rand(20, signals, generator=generator, dtype=torch.float64)
    more_NS = (
        signals_NS + torch.rand(20, signals, generator=generator, dtype=torch.float64) * (torch.arange(20) % 2)[:, None]
    )
    assert (gate.confidence(more_NS) >= gate.confidence(signals_NS)).all()
    assert (gate.keep(more_NS) | ~gate.keep(signals_NS)).all()
    confidence_N = gate.confidence(signals_NS)
    assert ((confidence_N >= 0) & (confidence_N <= 1)).all()


GATES = {signals: Gate.calibrate(*items(3, signals=signals), max_loss=0.02) for signals in (1, 3)}


def test_draws_follow_the_confidence() -> None:
    gate = GATES[1]
    signals_NS = torch.full((20_000, 1), 0.8)
    share = gate.draw(signals_NS, torch.Generator().manual_seed(0)).double().mean()
    assert share == pytest.approx(float(gate.confidence(signals_NS[:1])), abs=0.02)


def test_what_does_not_tell_is_refused() -> None:
    signals_NS, weak_N, strong_N = items(4, signals=2)
    with pytest.raises(CarpoolError, match="does not beat a random choice at equal cost"):
        Gate.calibrate(signals_NS[:, 1], weak_N, strong_N, max_loss=0.1)
    with pytest.raises(CarpoolError, match="use the strong one alone"):
        Gate.calibrate(signals_NS[:, 0], weak_N & False, strong_N | True, max_loss=0.0)
    with pytest.raises(CarpoolError, match="without a gate"):
        Gate.calibrate(signals_NS[:, 0], weak_N | True, strong_N, max_loss=0.0)
    with pytest.raises(CarpoolError, match="40 items or more"):
        Gate.calibrate(signals_NS[:10], weak_N[:10], strong_N[:10])
    with pytest.raises(CarpoolError, match="max_loss=2"):
        Gate.calibrate(signals_NS, weak_N, strong_N, max_loss=2)
    with pytest.raises(CarpoolError, match="finite numbers"):
        Gate.calibrate(signals_NS * torch.nan, weak_N, strong_N)


def test_chance_rarely_passes() -> None:
    """At a level of 95 % about one in twenty signals of noise may; the bound here is four standard errors wide."""
    passed, tried = 0, 200
    for seed in range(tried):
        signals_NS, weak_N, strong_N = items(seed + 100, 120, signals=2)
        try:
            Gate.calibrate(signals_NS[:, 1], weak_N, strong_N, max_cost=0.5)
        except CarpoolError:
            continue
        passed += 1
    assert passed / tried < 0.05 + 4 * (0.05 * 0.95 / tried) ** 0.5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=12))
def test_isotonic_is_the_closest_rising_function(pairs: list[tuple[int, int]]) -> None:
    """Against the max-min formula over all intervals."""
    ranked = sorted({score for score, _ in pairs})

    def mean(low: int, high: int) -> float:
        inside = [target for score, target in pairs if ranked[low] <= score <= ranked[high]]
        return sum(inside) / len(inside)

    scores, values = isotonic(*(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)))
    for place, score in enumerate(ranked):
        best = max(min(mean(low, high) for high in range(place, len(ranked))) for low in range(place + 1))
        found = [value for first, value in zip(scores, values, strict=True) if first <= score][-1]
        assert found == pytest.approx(best)


def test_a_gate_is_saved_and_read(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    GATES[3].save(path)
    assert Gate.load(path) == GATES[3]
    for broken in ("{}", "[]", path.read_text().replace('"schema": 1', '"schema": 2'), '{"schema": 1, "weights": [1]}'):
        path.write_text(broken)
        with pytest.raises(CarpoolError, match="no gate"):
            Gate.load(path)
