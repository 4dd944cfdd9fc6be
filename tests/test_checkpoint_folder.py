"""The folder of a checkpoint appears whole or not at all, and its recipe says how it was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from carpool import CarpoolError
from carpool.artefacts.checkpoint import RECIPE, Recipe, new_folder, require_new_folder

MADE = Recipe("reap", {"keep": 4}, "abc", "Model", [("a.jsonl", "00")], {"kl": 0.5})


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with new_folder(target) as folder:
        MADE.save(folder)
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    content = json.loads((target / RECIPE).read_text())
    assert content["method"] == "reap"
    assert content["data"] == [["a.jsonl", "00"]]
    assert content["errors"] == {"kl": 0.5}


def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    with new_folder(target) as folder:
        (folder / "a").touch()
    assert (target / "a").exists()


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        with new_folder(path) as folder:
            (folder / "a").touch()
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        half(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    for path, said in (("full", "not empty"), ("full/a", "a file is there"), ("none/made", "does not exist")):
        with pytest.raises(CarpoolError, match=said):
            require_new_folder(tmp_path / path)
    assert (tmp_path / "full/a").exists()
