"""Routing in two launches does what the general path does, over the inputs of the property tests (interpreted)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from harness import Trial, trials
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_tools import assert_agree
from policies_under_test import ROWS, Row

from carpool.kernels.traits import KNOWN_GUARDS, TRAITS
from carpool.policies import policy_class

COVERED = [row for row in ROWS if policy_class(row.name) in TRAITS]
every_policy = pytest.mark.parametrize("row", COVERED, ids=repr)


def covered(row: Row) -> st.SearchStrategy[Trial]:
    """Trials under guards that the kernels know; the others take the general path."""
    return trials(row).filter(lambda trial: all(type(guard) in KNOWN_GUARDS for guard in trial.plan.guards))


@every_policy
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_agrees_on_a_sample(row: Row, data: st.DataObject) -> None:
    assert_agree(data.draw(covered(row)))


@pytest.mark.slow
@every_policy
@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_agrees(row: Row, data: st.DataObject) -> None:
    assert_agree(data.draw(covered(row)))
