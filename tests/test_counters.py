"""Counters against loops over rows and steps."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from harness import trials
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS, Row

from carpool import Batch, RouteSpec, parse, route
from carpool.plans.counters import FIELDS, Counters, totals

COUNTED = [row for row in ROWS if row.name in ("oea", "surrogate")]


@pytest.mark.parametrize("row", COUNTED, ids=repr)
@given(data=st.data())
def test_totals_equal_a_loop(row: Row, data: st.DataObject) -> None:
    counters = Counters(["model.layers.0.mlp", "model.layers.1.mlp"])
    expected = dict.fromkeys(FIELDS, 0.0)
    for _ in range(data.draw(st.integers(0, 3))):
        trial = data.draw(trials(row))
        outcome, batch = trial.run(), trial.case.batch
        counters.add(1, batch, outcome)
        finite = trial.case.logits_NE.isfinite().all(-1).tolist()
        prompt = [False] * trial.case.rows
        if any(guard.name == "decode_only" for guard in trial.plan.guards) and "prefill_N" in trial.case.given:
            prompt = trial.case.given["prefill_N"].tolist()
        native = trial.case.spec.native(trial.case.logits_NE.nan_to_num()).ids_NK.tolist()
        ids, weights = outcome.routing.ids_NK.tolist(), outcome.routing.weights_NK.tolist()
        expected["calls"] += 1
        expected["steps"] += batch.num_steps
        heard, natural, union = set(), set(), set()
        left = [[0.0]] * trial.case.rows
        if outcome.routing.surrogate_ids_NK is not None and outcome.routing.surrogate_weights_NK is not None:
            left_ids, left = outcome.routing.surrogate_ids_NK.tolist(), outcome.routing.surrogate_weights_NK.tolist()
        foreseen = set()
        for index in range(trial.case.rows):
            if batch.voter_N[index] and finite[index] and not prompt[index]:
                heard.add(int(batch.group_N[index]))
            if not batch.real_N[index]:
                continue
            step = int(batch.step_N[index])
            natural |= {(step, expert) for expert in native[index]}
            union |= {(step, expert) for expert in ids[index]}
            expected["rows"] += 1
            expected["rows_nonfinite"] += not finite[index]
            expected["rows_exempt"] += finite[index] and bool(batch.exempt_N[index] or prompt[index])
            expected["rows_changed"] += sorted(ids[index]) != sorted(native[index])
            expected["pairs"] += sum(weight != 0 for weight in weights[index])
            expected["surrogate_pairs"] += sum(weight != 0 for weight in left[index])
            foreseen |= {(step, left_ids[index][slot]) for slot, weight in enumerate(left[index]) if weight}
            expected["displaced_mass"] += float(outcome.displaced_N[index])
            expected["expected_loss"] += float(outcome.expected_loss_N[index])
        expected["surrogates"] += len(foreseen)
        expected["natural_union"] += len(natural)
        expected["union"] += len(union)
        expected["coreset"] += sum(int(outcome.coreset_GE[group].sum()) for group in heard)
        expected["floor_overflow"] += int(outcome.overflow_SE.sum())
    idle, busy = counters.report()
    assert (idle.layer, busy.layer) == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert all(asdict(idle)[name] == 0 for name in FIELDS)
    assert {name: asdict(busy)[name] for name in FIELDS} == pytest.approx(expected)
    assert totals([idle, busy]) == pytest.approx(expected)
    counters.reset()
    assert all(value == 0 for value in totals(counters.report()).values())


def test_overflow_is_what_only_the_floor_reads() -> None:
    """Three rows and `oea(1)`: the coreset is {0, 2}; floor brings 1 back for row 0 and 3 for row 1."""
    from test_by_hand import routed

    outcome = routed("oea(1) | floor(0.42)")
    counters = Counters(["layer"])
    counters.add(0, outcome.inputs.batch, outcome)
    (report,) = counters.report()
    assert (report.rows, report.rows_changed, report.coreset, report.floor_overflow) == (3, 1, 2, 2)
    assert (report.natural_union, report.union, report.pairs) == (5, 4, 6)
    assert report.displaced_mass == pytest.approx(0.4)


def test_nothing_is_read_from_the_device() -> None:
    """Adding works on tensors without values."""
    from test_by_hand import routed
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        outcome = routed_without_values()
        Counters(["layer"]).add(0, outcome.inputs.batch, outcome)
    assert routed("oea(1)").union_SE.sum() == 2


def routed_without_values():
    from carpool import Batch, RouteSpec, parse, route

    return route(parse("oea(1) | floor(0.3)"), RouteSpec(top_k=2), torch.randn(3, 6), Batch.of(3))


def test_padding_hides_no_overflow() -> None:
    """Whatever logits it holds: natively routed padding that would read what the floor added is no reader."""
    spec, plan = RouteSpec(top_k=2), parse("xshare(2, warmup=0) | floor(0.2)")
    logits_NE = torch.tensor([[4.0, 3.0, 0, 0], [4, 3, 0, 0], [4, 3, 0, 0], [0, 0, 4, 3]])
    alone = route(plan, spec, logits_NE, Batch.of(4))
    for value in (0.0, float("nan"), float("inf")):
        padded_NE = torch.cat([logits_NE, torch.tensor([[value, 0, 1, 1]])])
        native = spec.native(padded_NE.nan_to_num())
        native.ids_NK[-1] = torch.tensor([2, 3])
        outcome = route(plan, spec, padded_NE, Batch.of(5, real_N=torch.arange(5) < 4), native=native)
        assert int(alone.overflow_SE.sum()) == int(outcome.overflow_SE.sum()) == 2
        assert not outcome.nonfinite_N.any()
