"""Which models the vLLM plugin shares, measured on the installed vLLM: `docs/results/vllm-coverage.json`.

    python benchmarks/vllm_coverage.py
    python benchmarks/vllm_coverage.py --only qwen3_moe         # this family's rows anew, the others as they are
    make coverage                                               # what is missing, on both runners and both versions

Tiny models with random weights: every family in every number format, quantised weights, and ways to spread a model over
workers. Each runs without the plugin, under a budget, switched off, and with a budget of all experts. Rows are of the
vLLM and of the runner that the environment names; those of others stay as they are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import vllm_models as tiny
from vllm_coverage import Case, cases, measure

from carpool.artefacts.files import write_text

RESULTS = ROOT / "docs/results/vllm-coverage.json"
SIMPLE = "one worker"
NAMES = ("vllm", "runner", "family", "storage", "parallel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="families to measure; keep the other rows")
    parser.add_argument("--storage", action="append", default=[], help="number formats to measure; keep the other rows")
    parser.add_argument("--missing", action="store_true", help="measure what the file lacks, as after an interruption")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)  # the number of one case, in this process
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tiny.set_environment()
    if options.alone is not None:
        keep(options.output, [run(cases()[options.alone])])
        return
    chosen = [
        (i, case)
        for i, case in enumerate(cases())
        if case.family in (options.only or [case.family]) and case.storage in (options.storage or [case.storage])
    ]
    if options.missing and options.output.exists():
        there = [tuple(row[name] for name in NAMES) for row in json.loads(options.output.read_text())["rows"]]
        chosen = [(i, case) for i, case in chosen if (*where(), *case.key) not in there]
    for i, case in chosen:
        code, cause = separate(case, options.output) if case.parallel == SIMPLE else started(i, case, options.output)
        if code:
            row = {"family": case.family, "storage": case.storage, "parallel": case.parallel}
            keep(options.output, [row | {"result": "failed", "says": f"ended with code {code}: {cause}"}])


def separate(case: Case, output: Path) -> tuple[int, str]:
    """A case in a copy of this process, which may end in any way, and in which no other model has left a patched class.

    Returns:
        Exit code, and the last that it said.
    """
    for name in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"):  # importing takes longer than most cases
        importlib.import_module(name)

    with tempfile.NamedTemporaryFile("r") as said:

        def alone() -> None:
            os.dup2(os.open(said.name, os.O_WRONLY), 2)
            keep(output, [run(case)])

        process = multiprocessing.get_context("fork").Process(target=alone)
        process.start()
        process.join()
        return process.exitcode or 0, last(said.read())


def started(number: int, case: Case, output: Path) -> tuple[int, str]:
    """The same from the beginning, for a case that starts processes by itself or compiles."""
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if "two" in case.parallel else "0"}
    command = [sys.executable, __file__, "--alone", str(number), "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    return done.returncode, last(done.stderr)


def last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def where() -> tuple[str, str]:
    """Version of vLLM, without importing it, and runner."""
    return version("vllm").partition("+")[0], "V2" if tiny.v2() else "V1"


def run(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        row = measure(case, Path(folder))
    print(*case.key, row["result"], row.get("says", ""), sep=" | ", flush=True)
    return row


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the file, in place of older ones of the same cases."""
    import torch

    made = {"torch": torch.__version__, "seed": 0, "budget": tiny.BUDGET}
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        content = json.loads(path.read_text())
        if {key: content[key] for key in made} != made:
            raise SystemExit(f"the other rows were not measured with {made}; move {path} away and measure all")
        kept = {tuple(row[name] for name in NAMES): row for row in content["rows"]}
    vllm, runner = where()
    for row in rows:
        kept[*where(), row["family"], row["storage"], row["parallel"]] = {"vllm": vllm, "runner": runner} | row
    order = [case.key for case in cases()]
    found = sorted(kept.items(), key=lambda item: (*item[0][:2], order.index(item[0][2:])))
    content = {"command": "python benchmarks/vllm_coverage.py", **made, "rows": [row for _, row in found]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
