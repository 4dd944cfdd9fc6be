"""Every policy against its slow twin: the same experts, ties included, and the same weights up to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import twins
from harness import Trial, trials
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS, Row

with_twin = pytest.mark.parametrize("row", [row for row in ROWS if row.twin is not None], ids=repr)


def compare(trial: Trial) -> None:
    outcome, policy = trial.run(), trial.plan.policy
    assert trial.row.twin is not None
    slow = twins.run(trial.world(), trial.row.twin, policy, trial.plan.guards, policy.kind)
    for group, coreset in enumerate(slow.coresets):
        assert set(outcome.coreset_GE[group].nonzero().flatten().tolist()) == coreset
    assert outcome.changed_N.tolist() == slow.changed
    assert outcome.displaced_N.tolist() == pytest.approx(slow.displaced, rel=1e-5, abs=1e-6)
    spec, scored_in = trial.case.spec, trial.case.logits_NE.dtype
    low = outcome.routing.weights_NK.dtype != torch.float32 or (
        spec.score_in_logits_dtype and scored_in != torch.float32
    )
    ids_NK, weights_NK = outcome.routing.ids_NK.tolist(), outcome.routing.weights_NK.tolist()
    for ids, weights, choice in zip(ids_NK, weights_NK, slow.choices, strict=True):
        assert set(ids) == set(choice)
        for expert, weight in choice.items():
            given_weight = sum(w for e, w in zip(ids, weights, strict=True) if e == expert)
            assert given_weight == pytest.approx(weight, rel=3e-2 if low else 2e-5, abs=1e-3 if low else 1e-7)


@with_twin
@given(data=st.data())
def test_twin(row: Row, data: st.DataObject) -> None:
    """Any scores, ties above all."""
    compare(data.draw(trials(row, groups=False)))


@with_twin
@given(data=st.data())
def test_twin_with_expert_groups(row: Row, data: st.DataObject) -> None:
    """Models that limit a row to some expert groups (scores without ties: the model's own choice of groups has no
    rule for them)."""
    compare(data.draw(trials(row, patterns=("normal",), dtypes=(torch.float32,))))


@with_twin
@given(data=st.data())
def test_twin_under_serving(row: Row, data: st.DataObject) -> None:
    """With the guards that serving adds."""
    trial = data.draw(trials(row, groups=False))
    compare(replace(trial, plan=trial.plan.for_serving()))
