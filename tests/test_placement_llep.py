"""LLEP: every token is computed once, under the cap as far as pieces allow, and nothing moves without need."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from placement_tools import random_trace

from carpool import CarpoolError
from carpool.placement.baselines import linear
from carpool.placement.demand import loads_LE
from carpool.placement.llep import least_loaded, replay


def slow_plan(tokens, home, devices, cap, least):
    """The paper's algorithms 2 and 3, one token count at a time, in dictionaries."""
    pending = {d: sum(n for n, h in zip(tokens, home, strict=True) if h == d) for d in range(devices)}
    assigned = dict.fromkeys(range(devices), 0)
    given_to = {}
    for expert in sorted(range(len(tokens)), key=lambda e: (-tokens[e], e)):
        rest, native = tokens[expert], home[expert]
        pending[native] -= rest
        keep = max(0, min(rest, cap - assigned[native] - pending[native]))
        assigned[native] += keep
        shares = {native: keep} if keep else {}
        rest -= keep
        while rest:
            others = sorted((d for d in range(devices) if d != native), key=lambda d: (assigned[d] + pending[d], d))
            for other in others:
                piece = min(rest, cap - assigned[other] - pending[other])
                if piece > 0 and not (piece < least and rest > piece):
                    break
            else:
                other, piece = (others[0] if others else native), rest
            shares[other] = shares.get(other, 0) + piece
            assigned[other] += piece
            rest -= piece
        given_to[expert] = shares
    return given_to


@given(
    st.integers(2, 5), st.lists(st.integers(0, 400), min_size=5, max_size=10), st.integers(1, 60),
    st.sampled_from([1.0, 1.1, 1.5]), st.integers(0, 100),
)  # fmt: skip
def test_every_token_once_and_as_the_paper_says(devices, tokens, least, alpha, seed):
    home_E = torch.randint(0, devices, (len(tokens),), generator=torch.Generator().manual_seed(seed))
    tokens_E = torch.tensor(tokens)
    placement = least_loaded(tokens_E, home_E, devices, alpha=alpha, least=least, ratio=1.0)
    served = {}
    for expert, _, first, end in placement.segments_X4.tolist():
        assert served.get(expert, 0) == first < end  # consecutive, without gaps
        served[expert] = end
    assert served == {e: n for e, n in enumerate(tokens) if n}
    if placement.standard:
        return
    shares = {}
    for expert, device, first, end in placement.segments_X4.tolist():
        shares.setdefault(expert, {})[device] = shares.get(expert, {}).get(device, 0) + end - first
    assert shares == {e: s for e, s in slow_plan(tokens, home_E.tolist(), devices, placement.cap, least).items() if s}
    assert placement.bound <= int(placement.loads_D.max())
    assert int(placement.loads_D.sum()) == sum(tokens)
    if least == 1:
        assert int(placement.loads_D.max()) <= placement.cap  # whatever the skew: any piece may go anywhere
    moves = {(e, d) for e, d, _, _ in placement.segments_X4.tolist() if d != int(home_E[e])}
    assert {tuple(one) for one in placement.moves_X2.tolist()} == moves


def test_even_loads_are_left_alone():
    home_E = torch.arange(8) // 2
    placement = least_loaded(torch.tensor([10, 12, 11, 10, 12, 10, 11, 10]), home_E, 4)
    assert placement.standard
    assert not len(placement.moves_X2)
    assert not least_loaded(torch.tensor([100, 12, 11, 10, 12, 10, 11, 10]), home_E, 4).standard
    assert least_loaded(torch.zeros(8, dtype=torch.int64), home_E, 4).standard


def test_memory_for_foreign_experts_is_a_cap():
    tokens_E, home_E = torch.tensor([900, 800, 5, 5]), torch.tensor([0, 0, 1, 2])
    free = least_loaded(tokens_E, home_E, 3, least=1)
    assert int(free.loads_D.max()) == free.cap
    one = least_loaded(tokens_E, home_E, 3, least=1, most_foreign=1)
    assert (one.moves_X2[:, 1].bincount(minlength=3) <= 1).all()
    none = least_loaded(tokens_E, home_E, 3, least=1, most_foreign=0)
    assert not len(none.moves_X2)
    assert none.loads_D.tolist() == [1700, 5, 5]
    assert none.peak_bytes(10, 1000) == 17_000
    assert free.peak_bytes(10, 1000) <= free.cap * 10 + 2000


def test_a_small_excess_stays_if_asked():
    tokens_E, home_E = torch.tensor([60, 20]), torch.tensor([0, 1])
    assert least_loaded(tokens_E, home_E, 2, least=64).loads_D.tolist() == [40, 40]  # all of the rest is one piece
    assert least_loaded(tokens_E, home_E, 2, least=64, keep_small=True).loads_D.tolist() == [60, 20]


def test_a_trace_is_replayed_step_by_step():
    trace = random_trace(60, 2, 8, 2, batch=20, skew=2.0)
    home_LE = linear(2, 8, 4).device_LE
    found = replay(trace, home_LE, 4, least=1)
    home, moved, sent = [], [], []
    for rows in trace.steps():
        for tokens_E, home_E in zip(loads_LE(trace.select(rows)), home_LE, strict=True):
            placement = least_loaded(tokens_E, home_E, 4, least=1)
            home.append(max(int(tokens_E[home_E == d].sum()) for d in range(4)) / 10)
            moved.append(int(placement.loads_D.max()) / 10)
            sent.append(len(placement.moves_X2))
    assert found.at_home == pytest.approx(sum(home) / 6)
    assert found.moved == pytest.approx(sum(moved) / 6)
    assert found.sent == pytest.approx(sum(sent) / 6)
    assert 1 <= found.moved < found.at_home


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("alpha=0.9", {"alpha": 0.9}),
        ("least=0", {"least": 0}),
        ("most_foreign=-1", {"most_foreign": -1}),
        ("home on one of 1 devices", {"devices": 1}),
        ("negative number", {"tokens_E": torch.tensor([-1, 2])}),
        ("3 experts with tokens", {"tokens_E": torch.tensor([1, 2, 3])}),
    ],
)
def test_impossible_numbers_are_refused(said, given):
    usual = {"tokens_E": torch.tensor([5, 2]), "home_E": torch.tensor([0, 1]), "devices": 2}
    with pytest.raises(CarpoolError, match=said):
        least_loaded(**{**usual, **given})
