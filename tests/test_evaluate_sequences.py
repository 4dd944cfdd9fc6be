"""Sequences are windows of the texts: seeded, without overlap, at random offsets, domains mixed, batches apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lockstep_tools import NumberTokenizer, numbers

from carpool.errors import CarpoolError
from carpool.evaluate.sequences import Cut, amount, draw

LENGTH = 9
APART = 100_000  # a document's tokens are this far from the next one's
TEXTS = [numbers("a", 200), numbers("a", 45, 1000), numbers("b", 120, 2000), numbers("c", 5, 3000)]
MANY = [numbers("ab"[index % 2], 12 + 7 * (index % 5), index * APART) for index in range(40)]


def windows(seed=0, count=20, texts=TEXTS, batches=1):
    return draw(texts, NumberTokenizer(), count=count, batches=batches, length=LENGTH, seed=seed)


def documents_of(ids_ST):
    return set((ids_ST[:, 0] // APART).tolist())


def test_windows_are_consecutive_tokens_of_one_document_without_overlap():
    found = windows()
    assert found.ids_ST.shape == (20, LENGTH + 1)
    assert bool((found.ids_ST.diff(dim=1) == 1).all())
    assert found.ids_ST.unique().numel() == found.ids_ST.numel()
    for ids, domain in zip(found.ids_ST, found.domain_S, strict=True):
        assert found.domains[domain] == ("a" if ids[0] < 2000 else "b")


@pytest.mark.parametrize("batches", [1, 2, 10])
def test_offsets_and_batches_are_seeded_and_random(batches):
    def at(seed):
        return windows(seed, 20, MANY, batches).ids_ST

    assert torch.equal(at(1), at(1))
    assert not torch.equal(at(1), at(2))
    offsets = {int(windows(seed, 1, [numbers("a", 25)]).ids_ST[0, 0]) % (LENGTH + 1) for seed in range(60)}
    assert offsets == set(range(LENGTH + 1))


texts_of = st.lists(st.tuples(st.sampled_from("abc"), st.integers(5, 120)), min_size=1, max_size=30)


@given(texts_of, st.integers(1, 6), st.integers(0, 3))
def test_no_document_is_in_two_batches(lengths, batch_size, seed):
    """Whatever the documents are, up to as many batches as are said to be possible; one more is refused."""
    texts = [numbers(domain, length, index * APART) for index, (domain, length) in enumerate(lengths)]
    cut = Cut.of(texts, NumberTokenizer(), length=LENGTH, seed=seed)
    most = cut.most(batch_size, seed)
    assert most <= len(texts)
    for batches in range(1, most + 1):
        found = cut.draw(batches, batch_size, seed=seed)
        assert found.batches == batches
        assert found.ids_ST.shape == (batches * batch_size, LENGTH + 1)
        assert found.ids_ST.unique().numel() == found.ids_ST.numel()
        parts = [documents_of(ids) for ids in found.ids_ST.split(batch_size)]
        assert sum(map(len, parts)) == len(set().union(*parts))
    if most:
        assert cut.draw_within(1, most + 5, batch_size, seed=seed).batches == most
        assert cut.draw_within(1, 1, batch_size, seed=seed).batches == 1
    with pytest.raises(CarpoolError, match=rf"{most} batches"):
        cut.draw_within(most + 1, most + 5, batch_size, seed=seed)
    with pytest.raises(CarpoolError, match=rf"{most} batches"):
        cut.draw(most + 1, batch_size, seed=seed)


def test_a_long_document_fills_one_batch_only():
    """Three documents and windows for three batches, of which two would share the long document."""
    cut = Cut.of(
        [numbers("a", size, APART * n) for n, size in enumerate((140, 12, 12))],
        NumberTokenizer(),
        length=LENGTH,
        seed=0,
    )
    assert cut.most(4, 0) == 1
    assert cut.most(1, 0) == 3


def test_one_window_of_every_document_before_a_second_of_any():
    found = windows(count=40, texts=MANY, batches=10)  # four windows a batch, four documents
    assert all(len(documents_of(ids)) == 4 for ids in found.ids_ST.split(4))
    found = windows(count=4, texts=TEXTS[:2])
    assert {bool(ids[0] >= 1000) for ids in found.ids_ST[:2]} == {True, False}


def test_every_prefix_of_a_batch_is_balanced_until_a_domain_runs_out():
    found = windows()
    for end in range(1, 17):
        counts = found.domain_S[:end].bincount(minlength=2)
        assert abs(int(counts[0] - counts[1])) <= 1
    assert found.domains == ("a", "b")  # c is too short for a window
    found = windows(count=32, texts=MANY, batches=8)
    for end in range(1, 33):
        counts = found.domain_S[:end].bincount(minlength=2)
        assert abs(int(counts[0] - counts[1])) <= 1


@pytest.mark.parametrize("count", [60, 10_000])
def test_too_little_text(count):
    said = rf"hold \d+ separate sequences of 10 tokens in 3 documents: 0 batches of {count}, and 1 are needed: add text"
    with pytest.raises(CarpoolError, match=said):
        windows(count=count)
    with pytest.raises(CarpoolError, match="hold 0 separate sequences"):
        windows(count=1, texts=[numbers("c", 5)])
    with pytest.raises(CarpoolError, match="3 batches of 2 that share no document, and 4 are needed"):
        windows(count=8, batches=4)
    with pytest.raises(CarpoolError, match="8 sequences do not make 3 equal batches"):
        windows(count=8, batches=3)


def test_how_many_batches():
    """Tokens that were asked for are an order, their default is a wish; ten make an interval."""
    assert amount(None, 3, 100, 10) == (3, 3)
    assert amount(200, None, 100, 10) == (20, 20)
    assert amount(30, None, 100, 10) == (3, 10)
    assert amount(1, None, 100, 10) == (1, 10)
    assert amount(None, None, 150, 10) == (1, 15)
    assert amount(None, None, 50, 10) == (1, 10)
