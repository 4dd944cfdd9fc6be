"""Reading JSON: what comes out, and the sentence for what does not."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool import CarpoolError
from carpool.artefacts.json_text import parse_json, read_json

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)  # fmt: skip


@given(value=PLAIN)
def test_what_was_written_comes_back(value):
    assert parse_json(json.dumps(value), "x") == value == parse_json(json.dumps(value).encode(), "x", any_number=True)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ("NaN", "NaN; give finite numbers"),
        ("[-Infinity]", "-Infinity; give finite numbers"),
        ("1e999", "1e999 is not finite"),
        ("9" * 5000, "a number of 5000 digits"),
        ('"\\ud83d"', "half a surrogate pair"),
        (b'"\xed\xa0\xbd"', "half a surrogate pair"),
        (b'"\xff"', "not UTF-8 .byte 1"),
        ('{"a": {"b": 1, "b": 2}}', "'b' comes twice"),
    ],
)
def test_what_is_refused(text, cause):
    with pytest.raises(CarpoolError, match=f"^here is not JSON: .*{cause}") as refusal:
        parse_json(text, "here")
    assert "\n" not in str(refusal.value)


def test_any_number_takes_what_nobody_reads():
    text = f'{{"id": {"1" * 5000}, "score": NaN, "more": [1e999, -{"2" * 5000}], "text": "x"}}'
    found = parse_json(text, "here", any_number=True)
    assert found["text"] == "x"
    assert found["id"] == found["more"][0] == float("inf")


def test_files(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": "ä"}'.encode("utf-8-sig"))
    assert read_json(tmp_path / "a.json", "the thing") == {"a": "ä"}
    with pytest.raises(CarpoolError, match=r"the thing .*a\.json has 14 bytes; such a file has at most 5"):
        read_json(tmp_path / "a.json", "the thing", most=5)
    with pytest.raises(CarpoolError, match=r"cannot read the thing .*none\.json: No such file"):
        read_json(tmp_path / "none.json", "the thing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CarpoolError, match="not a regular file"):
        read_json(tmp_path / "pipe")
