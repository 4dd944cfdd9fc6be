"""Text files: what they give, and the sentence for each that is refused."""

import pytest

from carpool import CarpoolError
from carpool.artefacts.texts import Document, load_texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", b"text", "neither a .txt nor a .jsonl"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8 .byte 3"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}',
            "line 2 has no .text. field .* its fields are 'body'|line 2 has no",
        ),
        ("a.jsonl", b'{"text": 3}', "line 1 has no"),
        ("a.jsonl", b"[1]", "it is no object"),
        ("a.jsonl", b'{"text": "a"', "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "half a surrogate pair"),
    ],
)
def test_bad_texts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CarpoolError, match=message):
        load_texts([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "one", "id": %s}\n{"text": "two"}' % (b"1" * 4400)),
        ("a.jsonl", b'{"text": "one", "score": NaN, "more": 1e999}\n{"text": "two"}'),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n'),
        ("a.jsonl", b'{"text": "one"}\r{"text": "two"}\r'),
        ("a.jsonl", b'{"text": "one"}\r\n\r\n{"text": "two"}'),
        ("A.JSONL", b'{"text": "one"}\n{"text": "two"}'),
    ],
)
def test_odd_lines_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [document.text for document in load_texts([tmp_path / name])] == ["one", "two"]


def test_a_line_is_named_by_its_number_whatever_ends_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r{"text": "two"}\r\n\n{"text": 3}')
    with pytest.raises(CarpoolError, match="line 4 has no"):
        load_texts([tmp_path / "a.jsonl"])


def test_plain_texts_put_together(tmp_path):
    (tmp_path / "A.TXT").write_bytes("\ufeffone\n\ufefftwo".encode())
    assert load_texts([tmp_path / "A.TXT"]) == [Document("A", "one\ntwo")]


def test_texts(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(f'{{"text": "{folder}\u2028z"}}\n\n{{"text": " "}}\n')
    (tmp_path / "poem.txt").write_bytes("\ufeffä\r\nb".encode())
    found = load_texts([tmp_path / "x/train.jsonl", tmp_path / "poem.txt", str(tmp_path / "y/train.jsonl")])
    assert found == [Document("x/train", "x\u2028z"), Document("poem", "ä\r\nb"), Document("y/train", "y\u2028z")]
    assert load_texts([tmp_path / "x/train.jsonl"])[0].domain == "train"
    with pytest.raises(CarpoolError, match="no text was given"):
        load_texts([])
