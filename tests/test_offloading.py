"""Consistency, cache rules and their simulator against slow twins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import offloading_twins as twins
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool import CarpoolError
from carpool.offloading import timeline
from carpool.offloading.accesses import Accesses, lockstep
from carpool.offloading.consistency import activations, chosen, consistency, segment_cache, segment_hits, srp
from carpool.offloading.curves import hits
from carpool.offloading.rules import (
    Belady,
    History,
    Hobbit,
    LayerDistance,
    Lfru,
    Lfu,
    Lru,
    Matched,
    Pinned,
    Rule,
    SequenceLfu,
    rule_of,
)
from carpool.offloading.simulate import Depths, simulate

E = 6


def routed(tokens: int, layers: int, top_k: int, seed: int, stay: float = 0.6) -> torch.Tensor:
    """Tokens whose experts are often those of the token before, int64 `[T, L, K]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(tokens, layers, E, generator=generator)
    for token in range(1, tokens):
        if float(torch.rand((), generator=generator)) < stay:
            rows[token] = rows[token - 1] + 0.3 * rows[token]
    return rows.topk(top_k, -1).indices


def as_sets(experts_TLK: torch.Tensor, layer: int) -> list[set[int]]:
    return [set(row) for row in experts_TLK[:, layer].tolist()]


def as_steps(accesses: Accesses) -> twins.Steps:
    return [[set(row.nonzero().flatten().tolist()) for row in step] for step in accesses.needed_SLE]


requests = st.builds(
    lambda lengths, layers, top_k, seed: [routed(T, layers, top_k, seed + at) for at, T in enumerate(lengths)],
    st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999),
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(given_=requests, window=st.integers(1, 6))
def test_srp_is_its_twin(given_: list[torch.Tensor], window: int) -> None:
    for layer in range(given_[0].shape[1]):
        windows_F = torch.stack([activations(chosen(one, E), window)[layer].sum(0) for one in given_]).sum(0)
        best = srp(windows_F)
        value, size = twins.srp([as_sets(one, layer) for one in given_], E, window)
        assert float(best.srp_X) == pytest.approx(value, abs=1e-12)
        assert float(best.size_X) == pytest.approx(size, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(given_=requests, window=st.integers(1, 6))
def test_the_best_threshold_follows_from_the_value(given_: list[torch.Tensor], window: int) -> None:
    """The smallest whole number from `m / 2` times SRP is as good as any (the paper's proof C.3)."""
    windows_F = torch.stack([activations(chosen(one, E), window).sum((0, 1)) for one in given_]).sum(0).double()
    if not windows_F.sum():
        return
    value = float(srp(windows_F).srp_X)
    least = int(-(-(window * value / 2 - 1e-9) // 1))
    often_F = torch.arange(window + 1)
    found, on = (often_F * windows_F)[least:].sum(), window * windows_F[least:].sum()
    assert float(2 * found / (on + (often_F * windows_F).sum())) == pytest.approx(value)


def test_who_always_chooses_the_same_is_perfectly_consistent() -> None:
    same = torch.tensor([0, 3]).expand(40, 2, 2)
    found = consistency([same, same], E, 16)
    assert (found.value, found.low, found.high, found.size, found.requests) == (1, 1, 1, 1, 2)
    turning = torch.arange(40).reshape(-1, 1, 1) % E
    assert consistency([turning], E, E).value == pytest.approx(2 / (1 + E))
    with pytest.raises(CarpoolError, match="the longest has 40"):
        consistency([same], E, 41)


@settings(deadline=None, max_examples=25)
@given(given_=requests, window=st.integers(1, 6), size=st.sampled_from([1.0, 1.5, 2.0]))
def test_segment_caches_are_their_twin(given_: list[torch.Tensor], window: int, size: float) -> None:
    found_RL, uses_RL = segment_hits(given_, E, window, size)
    for request, one in enumerate(given_):
        for layer in range(one.shape[1]):
            sets = as_sets(one, layer)
            assert int(found_RL[request, layer]) == twins.segment_hits(sets, int(size * one.shape[-1]), window)
            assert int(uses_RL[request, layer]) == sum(map(len, sets))


def test_a_segment_cache_holds_a_token() -> None:
    with pytest.raises(CarpoolError, match="does not hold one token's 2"):
        segment_cache([routed(5, 1, 2, 0)], E, 4, 0.5)


def ranks(accesses: Accesses, known: Accesses) -> dict[str, tuple[Rule, twins.Rank]]:
    """Every rule beside what it says, restated."""
    steps, L = as_steps(accesses), accesses.needed_SLE.shape[1]
    popular = Counter((layer, one) for row in as_steps(known) for layer, needed in enumerate(row) for one in needed)

    def uses(s: int, m: int, i: int, e: int) -> list[int]:
        return twins.uses_until(steps, s, m, i, e)

    def since(s: int, m: int, i: int, e: int) -> list[int]:
        begin = max(at for at in range(s + 1) if accesses.begins_S[at] or at == 0)
        return [event for event in uses(s, m, i, e) if event >= begin * L]

    def recent(s: int, m: int, i: int, e: int) -> float:
        return (max(uses(s, m, i, e), default=-1) + 1) / (s * L + m + 2)

    def ahead(m: int, i: int) -> int:
        return i - m if i > m else i - m + L

    def lfru(s: int, m: int, i: int, e: int) -> float:
        return len(uses(s, m, i, e)) / (s * L + m + 1 - max(uses(s, m, i, e), default=-1))

    def hobbit(s: int, m: int, i: int, e: int) -> float:
        begin = max(at for at in range(s + 1) if accesses.begins_S[at] or at == 0)
        latest = max((event // L + 1 for event in uses(s, m, i, e)), default=0)
        parts = (
            latest / (s + 1), len(uses(s, m, i, e)) / (s + 1), len(since(s, m, i, e)) / (s - begin + 1),
            1 - (ahead(m, i) - 1) / L,
        )  # fmt: skip
        return sum(weight * part for weight, part in zip((0.4, 0.3, 0.2, 0.1), parts, strict=True))

    return {
        "lru": (Lru(), lambda s, m, i, e: max(uses(s, m, i, e), default=-1)),
        "lfu": (Lfu(), lambda s, m, i, e: len(uses(s, m, i, e)) + recent(s, m, i, e)),
        "lfru": (Lfru(), lfru),
        "sequence_lfu": (SequenceLfu(), lambda s, m, i, e: len(since(s, m, i, e)) + recent(s, m, i, e)),
        "layer_distance": (LayerDistance(), lambda s, m, i, e: recent(s, m, i, e) - ahead(m, i)),
        "hobbit": (Hobbit(0.4, 0.3, 0.2, 0.1), hobbit),
        "pinned": (Pinned.fit(known), lambda s, m, i, e: popular[i, e] + recent(s, m, i, e) / 2),
        "belady": (Belady.fit(accesses), lambda s, m, i, e: -twins.next_use(steps, s, m, i, e)),
    }  # fmt: skip


@settings(deadline=None, max_examples=12)
@given(given_=requests, batch=st.integers(1, 2), capacity=st.integers(1, 7), shared=st.booleans())
def test_every_rule_is_its_twin(given_: list[torch.Tensor], batch: int, capacity: int, shared: bool) -> None:
    accesses = lockstep(given_, E, min(batch, len(given_)))
    known = lockstep([routed(9, given_[0].shape[1], 2, 77)], E)
    for name, (rule, rank) in ranks(accesses, known).items():
        found = simulate(accesses, rule, capacity, scope="model" if shared else "layer")
        assert int(found.misses_SL.sum()) == twins.misses(as_steps(accesses), rank, capacity, shared), name
        assert float(found.read_SL.sum()) == float(found.misses_SL.sum())


@settings(deadline=None, max_examples=12)
@given(given_=requests, batch=st.integers(1, 2))
def test_one_pass_says_what_every_size_would_have_hit(given_: list[torch.Tensor], batch: int) -> None:
    accesses = lockstep(given_, E, min(batch, len(given_)))
    known = lockstep([routed(9, given_[0].shape[1], 2, 77)], E)
    rules = {name: rule for name, (rule, _) in ranks(accesses, known).items()} | {"matched": Matched.fit(known)}
    for name, rule in rules.items():
        found_LE = hits(accesses, rule)
        for capacity in range(1, E + 1):
            missed_L = simulate(accesses, rule, capacity).misses_SL.sum(0)
            uses_L = accesses.needed_SLE.sum((0, 2))
            assert torch.equal(found_LE[:, capacity - 1], uses_L - missed_L), (name, capacity)


@settings(deadline=None, max_examples=15)
@given(given_=requests, capacity=st.integers(1, 6))
def test_nothing_beats_belady(given_: list[torch.Tensor], capacity: int) -> None:
    accesses = lockstep(given_, E)
    known = lockstep([routed(9, given_[0].shape[1], 2, 77)], E)
    bound = simulate(accesses, Belady.fit(accesses), capacity).misses_SL.sum(0)
    for layer in range(len(bound)):
        steps = [row[layer] for row in as_steps(accesses)]
        assert int(bound[layer]) == twins.fewest_misses(steps, capacity)
    for name, (rule, _) in ranks(accesses, known).items():
        assert bool((simulate(accesses, rule, capacity).misses_SL.sum(0) >= bound).all()), name
    whole = simulate(accesses, Belady.fit(accesses), capacity, scope="model").misses_SL.sum()
    for name, (rule, _) in ranks(accesses, known).items():
        assert int(simulate(accesses, rule, capacity, scope="model").misses_SL.sum()) >= int(whole), name


def test_requests_are_matched_by_the_layers_that_they_have_used() -> None:
    """Two known requests differ in their first layer only; what the present one did there tells which it is like."""
    known = torch.zeros(2, 3, E)
    known[0, 0, 0] = known[1, 0, 1] = 5
    known[0, 1:, 2] = known[1, 1:, 3] = 5
    rule, history = Matched(known), History(3, E)
    history.begin()
    history.observe(0, 0, torch.tensor([False, True] + [False] * 4))
    assert rule.nearest(history) == 1
    rank_LE = rule.rank(history)
    assert float(rank_LE[1, 3]) > float(rank_LE[1, 2])


@given(given_=requests, capacity=st.integers(1, 5), shares=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)))
@settings(deadline=None, max_examples=12)
def test_depths_are_read_as_rows_deserve_and_deepened(
    given_: list[torch.Tensor], capacity: int, shares: tuple[float, float]
) -> None:
    first, second = sorted(shares)
    generator = torch.Generator().manual_seed(len(given_))
    weights = [torch.rand(one.shape, generator=generator) + 0.01 for one in given_]
    accesses = lockstep(given_, E, 1, weights)
    depths = Depths((2, 1, 0), (first, second))
    found = simulate(accesses, Lru(), capacity, sizes=(0, 0.5, 1), depths=depths)
    held: dict[tuple[int, int], float] = {}
    token = 0
    for experts_TLK, weights_TLK in zip(given_, weights, strict=True):
        for row, mixed in zip(experts_TLK, weights_TLK, strict=True):
            for layer in range(row.shape[0]):
                read, heavier, total = 0.0, 0.0, float(mixed[layer].sum())
                mine = set()
                for slot in mixed[layer].sort(descending=True, stable=True).indices.tolist():
                    size = 1.0 if heavier <= first * total else 0.5 if heavier <= second * total else 0.0
                    at = (layer, int(row[layer, slot]))
                    near = min(abs(heavier / total - bound) for bound in (first, second))
                    if near < 1e-5:
                        return  # what lies on a bound may fall to either side
                    if size:
                        mine.add(at)
                        read += max(0.0, size - held.get(at, 0.0))
                        held[at] = max(size, held.get(at, 0.0))
                    heavier += float(mixed[layer, slot])
                assert float(found.read_SL[token, layer]) == pytest.approx(read), (token, layer)
                last = simulate_order(given_, token, layer)
                while sum(size for (of, _), size in held.items() if of == layer) > capacity + 1e-6:
                    some = [at for at in held if at[0] == layer]
                    victim = min(some, key=lambda at: (at in mine, last(at[1], accesses, depths), -at[1]))
                    del held[victim]
            token += 1


def simulate_order(given_: list[torch.Tensor], token: int, layer: int) -> Callable[[int, Accesses, Depths], int]:
    """When an expert of a layer was last read, up to a token."""

    def last(expert: int, accesses: Accesses, depths: Depths) -> int:
        levels = [int(depths.wanted(accesses.heavier_SLE[at, layer])[expert]) for at in range(token + 1)]
        return max((at for at, level in enumerate(levels) if level), default=-1)

    return last


def one_request(*tokens: list[list[int]]) -> Accesses:
    return lockstep([torch.tensor(tokens)], E)


def test_a_link_carries_one_expert_after_the_other() -> None:
    accesses = one_request([[0, 1]], [[0, 2]], [[0, 2]])
    link = timeline.Link(expert=2.0, start=0.5, layer=1.0)
    found = timeline.run(accesses, Lru(), 4, link)
    # two loads of 2.5 s, then one, then none; every layer computes for a second
    assert (found.seconds, found.stalled, found.misses, found.read) == (10.5, 7.5, 3, 3.0)
    assert found.stall_share == pytest.approx(7.5 / 10.5)


def test_what_is_fetched_ahead_is_there_or_on_its_way() -> None:
    accesses = one_request([[0], [1]], [[2], [3]])
    link = timeline.Link(expert=2.0, layer=1.0)
    foretold = torch.tensor([[[1], [2]], [[4], [-1]]])
    found = timeline.run(accesses, Lru(), 4, link, foretell=timeline.by_gates(foretold))
    # each fetch begins with the layer before and is a second late; the wrong one holds up the one that is needed
    assert (found.fetched, found.useful, found.misses, found.uses) == (3, 2, 4, 4)
    assert found.seconds == 2 + 1 + 1 + 1 + 1 + 1 + (1 + 2) + 1
    assert found.precision == pytest.approx(2 / 3)
    assert timeline.run(accesses, Lru(), 4, link).seconds == 4 * 3.0


def test_history_foretells() -> None:
    accesses = one_request(*([[[0], [1]], [[0], [1]], [[0], [1]]]))
    link = timeline.Link(expert=1.0, layer=1.0)
    found = timeline.run(accesses, Lru(), 1, link, foretell=timeline.successors(accesses, 1))
    assert found.misses == 1  # the very first
    assert list(timeline.as_before(accesses)(1, 0, accesses.needed_SLE[1, 0])) == [1]
    assert list(timeline.as_before(accesses)(0, 0, accesses.needed_SLE[0, 0])) == []


def test_rules_are_named() -> None:
    assert isinstance(rule_of("lru"), Lru)
    with pytest.raises(CarpoolError, match="unknown cache rule 'fifo'; use one of lru"):
        rule_of("fifo")
    with pytest.raises(CarpoolError, match="give a trace"):
        rule_of("pinned")
    with pytest.raises(CarpoolError, match="there are 1 requests"):
        lockstep([routed(3, 1, 1, 0)], E, 2)
