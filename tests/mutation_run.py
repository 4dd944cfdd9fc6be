"""Mutation testing: of small faults put into the code, how many do the fast tests notice?

    python -m venv /tmp/mutation && /tmp/mutation/bin/pip install -r tests/requirements-mutation.txt
    /tmp/mutation/bin/python tests/mutation_run.py --output mutation.json

Faults are sampled (seeded, every file has its share) from mutmut's operators and those of `mutation_operators.py`;
those named in `mutations.toml` are always tried. Each is put into a working copy that shadows the package and tested in
a process of one thread, under a time limit. The results are written after every mutant; the same command goes on where
it stopped. A mutant that survives is a hole, or no fault at all: read its diff.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libcst
from mutation_operators import mutated, places

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "pyproject.toml")  # all else is linked to
SLACK = 60  # seconds beyond three times what the tests take on the code as it is


@dataclass(frozen=True)
class Room:
    """What is mutated, how often, and the tests that run: one pytest process a stage, what kills fastest first.

    Attributes:
        paths: folders that these tests import from besides.
    """

    folders: tuple[str, ...]
    count: int
    stages: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ("__init__.py",)
    paths: tuple[str, ...] = ()


ROOMS = {
    "core": Room(
        ("routing", "policies", "plans"),
        30,
        (
            ("routing", "conformance", "by_hand", "core_choices", "keys", "budgets", "registry", "lynx",
             "base_energy", "allow_list", "surrogate", "surrogate_sums", "policy_file", "skipping", "naee_oracle",
             "random*", "xshare_*", "grammar", "isolation_bound", "counters", "bound", "twins", "fuzz"),
            ("properties",),
        ),
    ),
    "evaluate": Room(
        ("evaluate",),
        20,
        (
            ("evaluate_[!ci]*", "evaluate_intervals", "findings*", "series*", "leaderboard*", "lockstep", "answers"),
            ("tune", "tune_trials", "diffusion_evaluate", "evaluate_interference", "report", "evaluate_cli"),
        ),
        ("__init__.py", "plot.py"),  # pictures
    ),
    "tune": Room(("tune",), 10, (("tune_*", "tune", "benchmarks_tuned"),)),
    "calibrate": Room(("calibrate",), 0, (("surrogate_fit", "surrogates_in_models"),)),
    "kernels": Room(("kernels",), 20, (("kernels_rows",), ("kernels_agree", "kernels_vllm")), paths=(".venv/triton",)),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A fault: the file that it is in, its whole changed text, and what to call it."""

    room: str
    file: str
    label: str
    code: str
    diff: str
    named: bool = False

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.diff}".encode()).hexdigest()[:12]


def changed(room: str, file: str, label: str, old: str, new: str, *, named: bool = False) -> Mutant:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), file, file, n=2, lineterm="")
    return Mutant(room, file, label, new, "\n".join(lines), named)


def sample(name: str, room: Room, count: int, seed: int) -> list[Mutant]:
    """`count` mutants of a room: at least one a file where there are enough, the others by the file's size."""
    paths = [path for folder in room.folders for path in sorted((ROOT / "src/carpool" / folder).rglob("*.py"))]
    modules = {path: libcst.parse_module(path.read_text()) for path in paths if path.name not in room.left_out}
    mutable = {path: found for path, module in modules.items() if (found := places(module))}
    dice = random.Random(f"{seed} {name}")
    least = set(dice.sample(list(mutable), min(count, len(mutable))))
    more = count - len(least)
    total = sum(map(len, mutable.values()))
    exact = {path: more * len(found) / total for path, found in mutable.items()}
    shares = {path: int(exact[path]) + (path in least) for path in mutable}
    rest = sorted(mutable, key=lambda path: int(exact[path]) - exact[path])[: count - sum(shares.values())]
    made = []
    for path, found in mutable.items():
        file, module = str(path.relative_to(ROOT)), modules[path]
        dice = random.Random(f"{seed} {file}")  # a file that did not change has the same mutants again
        wanted = shares[path] + (path in rest)
        for node, variants in dice.sample(found, len(found)):
            if wanted == 0:
                break
            label, new = dice.choice(variants)
            code = mutated(module, node, new)
            if code is not None:
                made.append(changed(name, file, label, module.code, code))
                wanted -= 1
    return made


def named_mutants() -> list[Mutant]:
    """Those of `mutations.toml`; exits where the old text of one is not found exactly once."""
    made, errors = [], []
    for one in tomllib.loads((ROOT / "tests/mutations.toml").read_text())["mutation"]:
        text = (ROOT / one["file"]).read_text() if (ROOT / one["file"]).is_file() else ""
        if text.count(one["old"]) != 1:
            errors.append(f"{one['name']}: its old text occurs {text.count(one['old'])} times in {one['file']}")
            continue
        new = text.replace(one["old"], one["new"])
        made.append(changed(one["room"], one["file"], one["name"], text, new, named=True))
    if errors:
        sys.exit("tests/mutations.toml does not fit the code:\n" + "\n".join(errors))
    return made


# a process that has imported all but the package, and forks for every run of the tests: imports take longer than most
SERVER = """
import json, os, signal, sys
import hypothesis, numpy, pytest, rich.console, torch, typer.testing
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as conftest.py does, before anything imports Triton
import transformers.models.qwen3_moe.modeling_qwen3_moe
print("ready", flush=True)
for line in sys.stdin:
    arguments, limit, said = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        code = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Copy:
    """A working copy of the repository in a temporary folder, and the tests that run in it.

    Args:
        paths: folders of the repository that the tests import from besides.
    """

    def __init__(self, folder: Path, python: Path, paths: Sequence[str]) -> None:
        self.root = folder
        for path in ROOT.iterdir():
            if path.name in COPIED and path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.name in COPIED:
                shutil.copy(path, folder / path.name)
            elif path.name != ".git":
                (folder / path.name).symlink_to(path)
        found = os.pathsep.join(str(folder / part) for part in ("src", "demo/src", *paths))
        environment = os.environ | {"PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [str(python), "-c", SERVER], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()
        self.usual: dict[str, list[float]] = {}

    def _answer(self) -> str:
        assert self.server.stdout is not None
        answer = self.server.stdout.readline().strip()
        return answer or sys.exit("the process that runs the tests has ended")

    def files(self, room: Room) -> list[list[str]]:
        """Test files by stage, each once."""
        stages: list[list[str]] = []
        for patterns in room.stages:
            found = (path for one in patterns for path in sorted(self.root.glob(f"tests/test_{one}.py")))
            files = dict.fromkeys(str(path.relative_to(self.root)) for path in found)
            stages.append([file for file in files if not any(file in stage for stage in stages)])
        return stages

    def measure(self, name: str) -> None:
        """How long the tests of a room take on the code as it is; exits where they fail."""
        self.usual[name] = []
        for stage in self.files(ROOMS[name]):
            start = time.monotonic()
            outcome, said = self.run(stage, 3600)
            if outcome != "survived":
                sys.exit(f"the tests of {name} fail without any mutant:\n{said}")
            self.usual[name].append(time.monotonic() - start)

    def run(self, files: Sequence[str], limit: float) -> tuple[str, str]:
        """`killed`, `survived` or `timed out`, and the first test that failed."""
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow and not vllm"]
        said = self.root / "output.txt"
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([[*options, *files], round(limit), str(said)]) + "\n")
        self.server.stdin.flush()
        code = int(self._answer())
        if code == -signal.SIGALRM:
            return "timed out", ""
        if code == 0:
            return "survived", ""
        told = [line for line in said.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
        return "killed", told[0][:200] if told else said.read_text()[-500:]

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        path = self.root / mutant.file
        original = path.read_text()
        path.write_text(mutant.code)
        try:
            outcome = "survived", ""
            for files, usual in zip(self.files(ROOMS[mutant.room]), self.usual[mutant.room], strict=True):
                stem = Path(mutant.file).stem
                outcome = self.run(sorted(files, key=lambda file: stem not in file), 3 * usual + SLACK)
                if outcome[0] != "survived":
                    break
        finally:
            path.write_text(original)
        return outcome


def summary(results: Sequence[dict[str, Any]]) -> str:
    """As Markdown: counts by room and file, the named ones, and the diffs of all that survived."""
    kinds = ("killed", "survived", "timed out")
    parts = []
    for title, of in (("Sampled", False), ("Named", True)):
        these = [one for one in results if one["named"] == of]
        if not these:
            continue
        noticed = sum(one["outcome"] != "survived" for one in these)
        parts += [f"## {title}: {noticed} of {len(these)} noticed ({noticed / len(these):.0%})", ""]
        parts += ["| where | " + " | ".join(kinds) + " |", "|---|" + "--:|" * len(kinds)]
        for key in ("room", "file"):
            for where in dict.fromkeys(one[key] for one in these):
                counts = Counter(one["outcome"] for one in these if one[key] == where)
                parts.append(f"| {where} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |")
        parts.append("")
        parts += [f"- {one['label']}: {one['outcome']} {one['by']}" for one in these if of]
        for one in these:
            if one["outcome"] == "survived":
                parts += ["", f"### {one['key']} {one['label']}", "", "```diff", one["diff"], "```"]
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; a Markdown summary is written beside it")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv/bin/python", help="that has what the tests need")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", action="append", default=[], metavar="ROOM=N", help=f"rooms: {', '.join(ROOMS)}")
    parser.add_argument("--only", choices=("sampled", "named"))
    given = parser.parse_args()
    counts = {name: room.count for name, room in ROOMS.items()}
    counts |= {name: int(count) for name, count in (one.split("=") for one in given.count)}
    mutants = [] if given.only == "sampled" else named_mutants()
    if given.only != "named":
        mutants += [one for name in ROOMS for one in sample(name, ROOMS[name], counts[name], given.seed)]
    run = {"seed": given.seed, "counts": counts, "mutants": [one.key for one in mutants]}
    done: list[dict[str, Any]] = []
    if given.output.exists():
        earlier = json.loads(given.output.read_text())
        if earlier["run"] != run:
            sys.exit(f"{given.output} is of another seed, other counts or other code; name another file")
        done = earlier["results"]
    left = [one for one in mutants if one.key not in {result["key"] for result in done}]
    with ExitStack() as folders:
        copies: dict[tuple[str, ...], Copy] = {}
        for name in dict.fromkeys(one.room for one in left):
            paths = ROOMS[name].paths
            if paths not in copies:
                folder = folders.enter_context(tempfile.TemporaryDirectory(prefix="mutation-"))
                copies[paths] = Copy(Path(folder), given.python.absolute(), paths)
            copies[paths].measure(name)
            print(f"{name}: {sum(copies[paths].usual[name]):.0f} s for the tests", flush=True)
        for at, mutant in enumerate(left, len(done) + 1):
            start = time.monotonic()
            outcome, by = copies[ROOMS[mutant.room].paths].judge(mutant)
            taken = round(time.monotonic() - start, 1)
            print(f"[{at}/{len(mutants)}] {outcome} in {taken} s: {mutant.file}: {mutant.label} {by}", flush=True)
            fields = {name: value for name, value in asdict(mutant).items() if name != "code"}
            done.append(fields | {"key": mutant.key, "outcome": outcome, "by": by, "seconds": taken})
            given.output.write_text(json.dumps({"run": run, "results": done}, indent=1))
            given.output.with_suffix(".md").write_text(summary(done))
    print(summary(done))


if __name__ == "__main__":
    main()
