"""What is said of a comparison, on curves whose numbers are known: who is best at half, at what cost, and who loses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_sums import BATCHES, measured

from carpool.evaluate.equal_bytes import Points
from carpool.evaluate.findings import best_at, findings, over_controls
from carpool.evaluate.measured import Measured
from carpool.evaluate.metrics import results
from carpool.evaluate.plot import headline
from carpool.evaluate.series import Curve, Series, worse

# at half: 0.04, 0.1, 0.2 (geometric means, the settings lie around it evenly)
OURS = [measured("xshare(budget=2)", 0.4, 0.08, 0.03), measured("xshare(budget=4)", 0.6, 0.02, 0.01)]
OTHER = [measured("oea(k0=1)", 0.3, 0.2, 0.2), measured("oea(k0=2)", 0.7, 0.05, 0.1)]
CONTROL = [measured("random(budget=2)", 0.3, 0.4, 0.5), measured("random(budget=4)", 0.7, 0.1, 0.3)]
CONTROLS = ("random", "topk")


def curves(**series: list[Measured]) -> list[Curve]:
    """By label, all measured on the same batches."""
    every = [one for settings in series.values() for one in settings]
    found = results([first_of(measured(), every[0].batches), *every])
    return [
        Curve.of(Series(label, tuple(one.plan for one in settings), label in CONTROLS), found)  # type: ignore[misc]
        for label, settings in series.items()
    ]


def test_the_best_at_half_and_what_controls_cost_there() -> None:
    first, second, third = findings(curves(ours=OURS, other=OTHER, random=CONTROL))
    assert first == (
        "At half of what stock reads (4.0 instead of 8.0 experts in a layer and step), ours stays closest to the "
        "model: KL 0.04 nats a token, perplexity +2.0 %."
    )
    times, low, high = second.partition(" times as much")[0].split("(")[1].replace("[", "").replace("]", "").split()
    assert second.startswith("At equal bytes, random costs KL 0.2 (5.0 [")
    assert second.endswith("times as much) and perplexity +49.2 %.")
    assert float(low.strip(",")) < float(times) < float(high)
    assert third == "No method loses to a control at equal bytes, at any of its settings."


@pytest.mark.parametrize("turned", [False, True])
def test_settings_may_come_in_any_order(turned: bool) -> None:
    settings = [measured("oea(k0=1)", 0.25, 0.2, 0.2), measured("oea(k0=2)", 0.5, 0.05, 0.1)]
    (curve,) = curves(other=settings[::-1] if turned else settings)
    assert curve.share_I.tolist() == [0.25, 0.5]
    assert [one.measured.name for one in curve.results] == ["oea(k0=1)", "oea(k0=2)"]
    assert np.exp(curve.log_kl_I) == pytest.approx([0.2, 0.05])
    assert np.exp(curve.log_kl_at(0.375)) == pytest.approx(0.1)
    assert curve.log_ratio_at(0.3125) == pytest.approx(0.175)
    assert [curve.points.holds(share) for share in (0.24, 0.25, 0.5, 0.51)] == [False, True, True, False]


def test_points_at_equal_bytes_may_come_in_any_order() -> None:
    stock_M = measured().layers["bytes"].sum(1)
    sums = [(one.layers["bytes"].sum(1), one.kl_M, one.tokens_M) for one in (*OTHER, *OURS)]
    first, second = Points.of(sums, stock_M), Points.of(sums[::-1], stock_M)
    assert first.share_KI[0] == pytest.approx([0.3, 0.4, 0.6, 0.7])
    assert np.array_equal(first.share_KI, second.share_KI)
    assert np.array_equal(first.log_kl_KI, second.log_kl_KI)
    assert np.exp(first.at(0.5)[0]) == pytest.approx(0.04)


def test_the_best_is_a_method_that_spans_the_share_and_no_control() -> None:
    made = curves(ours=OURS, other=OTHER, random=[measured("random(budget=2)", 0.3, 1e-4), CONTROL[1]])
    for share, label in ((0.5, "ours"), (0.65, "other"), (0.35, "other")):
        best = best_at(made, share)
        assert best is not None
        assert best.series.label == label
    assert best_at(made, 0.9) is None


def test_methods_that_the_batches_do_not_tell_apart_are_named() -> None:
    near = [measured("lynx(budget=2)", 0.4, 0.0805, spread=0.3), measured("lynx(budget=4)", 0.6, 0.0205, spread=0.3)]
    first, *_ = findings(curves(ours=OURS, near=near, other=OTHER))
    assert first.endswith(" (not to be told apart from near on these batches).")


def test_worse_is_a_positive_difference_of_logarithms() -> None:
    other, control = curves(other=OTHER, random=CONTROL)
    difference_K = worse(other, 1, control)
    assert len(difference_K) == BATCHES + 1
    assert difference_K[0] == pytest.approx(np.log(0.05 / 0.1))
    assert worse(control, 1, other)[0] == pytest.approx(np.log(2))


def test_who_loses_to_a_control() -> None:
    """A setting loses where its KL is above the control's at equal bytes on all that the batches say."""
    bad = [measured("lynx(budget=2)", 0.4, 0.6), measured("lynx(budget=4)", 0.6, 0.3)]  # random: 0.28, 0.14
    said = findings(curves(ours=OURS, bad=bad, random=CONTROL))[-1]
    named = "lynx(budget=2), lynx(budget=4) lose to random"
    assert said == f"At equal bytes (95 % interval of the KL ratio above 1), {named}."
    one = [bad[0], measured("lynx(budget=4)", 0.6, 0.05)]
    assert findings(curves(bad=one, random=CONTROL))[-1].endswith(", lynx(budget=2) loses to random.")
    # a control that does not reach so far beats nobody
    topk = [measured("topk(k=1)", 0.1, 1e-5), measured("topk(k=2)", 0.2, 1e-6)]
    assert findings(curves(bad=one, topk=topk))[-1] == "No setting of a method lies where a control was measured."
    # as good as the control is no loss
    like = [measured("lynx(budget=2)", 0.25, 0.4, spread=0), measured("lynx(budget=4)", 0.5, 0.1, spread=0)]
    topk = [measured("topk(k=1)", 0.25, 0.4, spread=0), measured("topk(k=2)", 0.5, 0.1, spread=0)]
    assert findings(curves(like=like, topk=topk))[-1].startswith("No method loses")
    # worse on average only: the scatter between batches is larger than the difference
    doubtful = [measured("lynx(budget=2)", 0.4, 0.30, spread=0.9), measured("lynx(budget=4)", 0.6, 0.05)]
    assert findings(curves(bad=doubtful, random=CONTROL))[-1].startswith("No method loses")


def test_settings_beside_controls_at_equal_bytes() -> None:
    """A control's first and last settings stand for what lies a hair outside of them."""
    own = [measured("oea(k0=1)", 0.29, 0.2), measured("oea(k0=2)", 0.5, 0.05), measured("oea(k0=4)", 0.73, 0.05)]
    first, second = over_controls(curves(other=own, random=CONTROL))
    assert (first.policy, second.policy, first.control) == ("oea(k0=1)", "oea(k0=2)", "random")
    assert first.ratio.value == pytest.approx(0.5)
    assert second.ratio.value == pytest.approx(0.25)
    assert first.ratio.low is not None
    assert first.ratio.low < 0.5 < first.ratio.high


@pytest.mark.parametrize("batches", [1, 9])
def test_few_batches_say_that_they_are_few(batches: int) -> None:
    """Neither a finding, nor an interval, nor a headline."""
    made = curves(ours=[first_of(one, batches) for one in OURS], random=[first_of(one, batches) for one in CONTROL])
    (said,) = findings(made)
    assert said.startswith(f"Too few batches ({batches}) to say which method is better")
    assert said.endswith("Decode 10 or more (--batches 10).")
    assert {(one.ratio.low, one.ratio.high) for one in over_controls(made)} == {(None, None)}
    assert headline(made) == "What sharing experts saves and costs"
    assert headline(curves(ours=OURS, random=CONTROL)).endswith("with ours")


def first_of(one: Measured, batches: int) -> Measured:
    """The first batches alone."""
    sums = {name: getattr(one, name)[:batches] for name in ("kl_M", "agree_M", "nll_MD", "tokens_MD")}
    return replace(one, layers={name: sums_ML[:batches] for name, sums_ML in one.layers.items()}, **sums)


def test_nothing_is_said_where_nothing_was_measured() -> None:
    said = findings(curves(ours=[OURS[1]], random=CONTROL))
    assert said[0] == "No method was measured on both sides of half of what stock reads."
    assert said[1] == "Nothing can be said about its cost."
    assert findings(curves(ours=OURS, random=[CONTROL[0]]))[1] == "No control was measured on both sides of that."
