"""Text to search on and text to verify on: nothing that is said in one half is said in the other."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.artefacts.texts import Document
from carpool.errors import CarpoolError
from carpool.tune.split import split

WORDS = st.lists(st.sampled_from(["one", "two", "three", "four"]), min_size=1, max_size=3).map(" ".join)
DISGUISED = st.tuples(WORDS, st.sampled_from([str, str.upper, lambda text: f"  {text}\n", lambda text: text.title()]))
DOCUMENTS = st.lists(
    st.builds(Document, st.sampled_from("abc"), DISGUISED.map(lambda pair: pair[1](pair[0]))), min_size=1, max_size=40
)


def said(document: Document) -> str:
    return " ".join(document.text.lower().split())


def texts(halves: object) -> tuple[set[str], set[str]]:
    search, verify = ({said(one) for one in half} for half in (halves.search, halves.verify))  # type: ignore[attr-defined]
    return search, verify


@given(DOCUMENTS, st.randoms())
def test_no_text_is_in_both_halves_whatever_is_repeated(documents: list[Document], random: object) -> None:
    try:
        halves = split(documents)
    except CarpoolError:  # a domain of one document that repeats itself
        return
    search, verify = texts(halves)
    assert not search & verify
    assert max(Counter(map(said, halves.search)).values(), default=1) == 1
    assert max(Counter(map(said, halves.verify)).values(), default=1) == 1
    shuffled = list(documents)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    if len({one.domain for one in documents}) == 1 < len(search | verify):  # of a text in two domains one keeps it
        assert texts(split(shuffled)) == (search, verify)


def numbered(count: int) -> list[Document]:
    """Documents whose lengths differ up to fivefold."""
    return [Document("b", f"text {n} " + "and more of it " * (n * 7 % 15 + 3)) for n in range(count)]


def test_duplicates_are_left_out_and_counted() -> None:
    documents = numbered(100)
    doubled = [*documents, *(Document("b", one.text.upper() + "\n") for one in documents)]
    halves = split(doubled)
    assert halves.dropped == 100
    assert texts(halves) == texts(split(documents))
    search, verify = texts(halves)
    assert len(search) + len(verify) == 100
    assert math.isclose(*(sum(map(len, half)) for half in (search, verify)), rel_tol=0.05)


def test_other_documents_move_no_text_but_those_beside_the_cut() -> None:
    """Nor does a document's place in its file."""
    search, verify = texts(split(numbered(100)))
    more = [Document("a", "something else of another domain"), Document("a", "and one more"), *numbered(110)[::-1]]
    other_search, other_verify = texts(split(more))
    assert len(search & other_verify) + len(verify & other_search) <= 5


def test_few_and_uneven_documents() -> None:
    for count in (2, 3, 4):
        halves = split(numbered(count))
        assert halves.search
        assert halves.verify
    uneven = split([Document("b", "long " * 500), *numbered(3)])
    assert {len(uneven.search), len(uneven.verify)} == {1, 3} or len(uneven.search) + len(uneven.verify) == 4


def test_a_domain_of_one_document_is_cut_in_the_middle() -> None:
    text = " ".join(map(str, range(200)))
    halves = split([Document("a", text), *numbered(8)])
    ((first,), (second,)) = ([one.text for one in half if one.domain == "a"] for half in (halves.search, halves.verify))
    assert first + second == text
    assert abs(len(first) - len(second)) <= 1
    # one file given twice is one document
    assert split([Document("a", text), Document("a", text)]).dropped == 1


@pytest.mark.parametrize("text", ["{0}\n{0}", "{0} {0} {0}", "Preface. {0}\n\nPreface. {0}", "x" * 10])
def test_a_document_that_repeats_itself_has_no_unseen_half(text: str) -> None:
    with pytest.raises(CarpoolError, match="end of a document of 'a' repeats its beginning"):
        split([Document("a", text.format(" ".join(map(str, range(300)))))])


def test_a_half_that_is_also_another_document_is_left_out() -> None:
    text = " ".join(map(str, range(200)))
    half = split([Document("a", text)]).verify[0].text
    others = [Document("b", half), *numbered(3)]
    halves = split([Document("a", text), *others])
    assert not set.intersection(*texts(halves))
