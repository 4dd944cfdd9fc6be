"""Windows of text: random offsets, no overlap, domains mixed, and a clear word when the text is too short."""

import pytest
import torch
from lockstep_tools import NumberTokenizer, numbers

from carpool.errors import CarpoolError
from carpool.evaluate.sequences import draw

LENGTH = 9
TEXTS = [numbers("a", 200), numbers("a", 45, 1000), numbers("b", 120, 2000), numbers("c", 5, 3000)]


def windows(seed=0, count=20, texts=TEXTS):
    return draw(texts, NumberTokenizer(), count=count, length=LENGTH, seed=seed)


def test_windows_are_consecutive_tokens_of_one_document_without_overlap():
    found = windows()
    assert found.ids_ST.shape == (20, LENGTH + 1)
    assert bool((found.ids_ST.diff(dim=1) == 1).all())
    assert found.ids_ST.unique().numel() == found.ids_ST.numel()
    for ids, domain in zip(found.ids_ST, found.domain_S, strict=True):
        assert found.domains[domain] == ("a" if ids[0] < 2000 else "b")


def test_offsets_are_seeded_and_random():
    assert torch.equal(windows(1).ids_ST, windows(1).ids_ST)
    assert not torch.equal(windows(1).ids_ST, windows(2).ids_ST)
    offsets = {int(windows(seed, 1, [numbers("a", 25)]).ids_ST[0, 0]) % (LENGTH + 1) for seed in range(60)}
    assert offsets == set(range(LENGTH + 1))


def test_every_prefix_is_balanced_until_a_domain_runs_out():
    found = windows()
    for end in range(1, 17):
        counts = found.domain_S[:end].bincount(minlength=2)
        assert abs(int(counts[0] - counts[1])) <= 1
    assert found.domains == ("a", "b")  # c is too short for a window


def test_documents_take_turns():
    """The short document of a gives its first window before the long one gives its second."""
    found = windows(count=4, texts=TEXTS[:2])
    assert {bool(ids[0] >= 1000) for ids in found.ids_ST[:2]} == {True, False}


@pytest.mark.parametrize("count", [60, 10_000])
def test_too_little_text(count):
    with pytest.raises(CarpoolError, match=rf"hold \d+ separate sequences of 10 tokens and {count} are needed"):
        windows(count=count)
    with pytest.raises(CarpoolError, match="hold 0 separate sequences"):
        windows(count=1, texts=[numbers("c", 5)])
