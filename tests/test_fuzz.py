"""Bad input of every kind: it is read, or refused in one sentence; nothing else may come out.

The fast tests try a fixed number of inputs. `make test-all` goes on for `CARPOOL_FUZZ_SECONDS` (default 600), shared by
the targets, from another seed each time (`CARPOOL_FUZZ_SEED` repeats a run; a failure names it). With
`CARPOOL_FUZZ_REPORT` the numbers of inputs go to that file, `docs/results/fuzz.json` for the documentation.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from fuzz_targets import TARGETS
from test_statistics import statistics

from carpool import CarpoolError, parse

SECONDS = float(os.environ.get("CARPOOL_FUZZ_SECONDS", "600"))
SEED = int(os.environ.get("CARPOOL_FUZZ_SEED", str(time.time_ns() % 2**32)))
REPORT = Path(os.environ["CARPOOL_FUZZ_REPORT"]).absolute() if "CARPOOL_FUZZ_REPORT" in os.environ else None
FAST = {"text": 600, "policy_file": 250, "statistics": 120, "settings": 400, "logits": 150, "results": 50}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a valid file of statistics, a link that leads nowhere, a folder and a pipe nobody writes to."""
    statistics().save(tmp_path / "stats.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", TARGETS)
def test_bad_input_is_refused_and_nothing_else(target: str, folder: Path) -> None:
    went_through = [TARGETS[target](random.Random(f"{target} {i}"), folder) for i in range(FAST[target])]
    assert any(went_through), "the inputs are so bad that nothing behind the first check is reached"
    if target != "logits":
        assert not all(went_through)


LONG = 9000
LONG_TEXTS = (
    "x" * LONG, f"top{'9' * LONG}k(1)", f"topk({'x' * LONG}=1)", f"topk('{'x' * LONG}')", f"topk({[1] * (LONG // 3)})",
    f"xshare(budget='{'x' * LONG}')", f"xshare(budget={[1] * (LONG // 3)})", f"topk(1) | floor('{'x' * LONG}')",
    f"topk(1) | protect({list(range(-1000, 1000))})", f"topk(1) | {'x' * LONG}(1)",
    f"sere(top=1, metric='{'x' * LONG}')", f"topk([[0x{'9' * LONG}]])", f"topk(1, 2, [[0x{'9' * LONG}]])",
)  # fmt: skip


@pytest.mark.parametrize("text", LONG_TEXTS, ids=lambda text: text[:24])
def test_what_is_refused_may_be_long_but_not_the_message(text: str) -> None:
    with pytest.raises(CarpoolError) as refusal:
        parse(text).check(16, 4)
    message = str(refusal.value)
    assert len(message) < 2500
    assert "\n" not in message


def report(path: Path, target: str, count: int, read: int) -> None:
    """Add a target to the report; a file of another seed or length is begun anew."""
    head = {"kind": "carpool fuzz", "arguments": {"seed": SEED, "seconds": SECONDS}}
    old = json.loads(path.read_text()) if path.exists() else {}
    targets = old["targets"] if old.get("arguments") == head["arguments"] else {}
    content = head | {"targets": targets | {target: {"inputs": count, "read": read, "refused": count - read}}}
    path.write_text(json.dumps(content, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_ten_minutes_of_bad_input(target: str, folder: Path) -> None:
    end, count, read = time.monotonic() + SECONDS / len(TARGETS), 0, 0
    while count < FAST[target] or time.monotonic() < end:  # a machine that stood still meanwhile has tried nothing
        name = f"{SEED} {target} {count}"
        try:
            read += TARGETS[target](random.Random(name), folder)
        except Exception as error:
            raise AssertionError(f"input {name!r} of CARPOOL_FUZZ_SEED={SEED}: {error!r}") from error
        count += 1
    assert count > read or target == "logits"
    assert read > 0
    if REPORT is not None:
        report(REPORT, target, count, read)
