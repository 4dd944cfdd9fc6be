"""How long the command line takes to start: --help, --version, policies, and doctor on a configuration.

python benchmarks/startup.py MODEL --output docs/results/startup.json     # MODEL: a folder with a config.json

Every command runs once before it is timed, so that its files are in memory; seconds are medians of wall-clock and of
processor time (user and system), with what else kept the machine busy (`load`) beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from carpool.artefacts.files import write_text
from carpool.evaluate.results import provenance

RUN = "from carpool.cli import main; main()"


def timed(arguments: list[str], repeats: int) -> dict[str, object]:
    """Medians over the repeats, and the slowest."""
    command = [sys.executable, "-c", RUN, *arguments]
    walls, processor = [], []
    for repeat in range(repeats + 1):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if repeat:  # the first one warms up
            walls.append(wall)
            processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "command": " ".join(["carpool", *arguments]), "seconds": statistics.median(walls), "slowest": max(walls),
        "processor_seconds": statistics.median(processor),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder with a config.json, for doctor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [timed(arguments, given.repeats) for arguments in (["--help"], ["--version"], ["policies"])]
    rows.append(timed(["doctor", str(given.model)], given.repeats) | {"command": f"carpool doctor {given.model.name}"})
    load = os.getloadavg()[0]
    content = {**provenance(), "repeats": given.repeats, "cores": os.cpu_count(), "load": load, "rows": rows}
    write_text(given.output, json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(f"{row['command']}: {row['seconds']:.2f} s, {row['processor_seconds']:.2f} s of processor time")


if __name__ == "__main__":
    main()
