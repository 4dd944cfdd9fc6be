"""Experts on disk: what caches hit on the routing of trained models, and how fast a large model decodes from disk.

    python benchmarks/offload.py routing [--model DIR --name NAME] --output docs/results/offload.json
    python benchmarks/offload.py quality --output docs/results/offload.json      # reference model in planes
    python benchmarks/offload.py sharing --folder SCRATCH --output docs/results/offload.json
    python benchmarks/offload.py speed --folder SCRATCH [--piece "exact 0.25" ...] --output docs/results/offload.json

Each part is written into the file beside the others, and so is each piece of the speeds. Those of llama.cpp need it
(`offload_llama.py` says how), those of limited memory need root. Speed is measured on random weights with the layers of
Qwen3-30B-A3B, fewer of them; their experts are chosen as the trained reference model's layers chose theirs, which has
64 a layer: random routers have no locality. Bytes are those that the operating system counts for this process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1] / "src"),
    str(Path(__file__).parents[1] / "demo" / "src"),
]

import offload_quality
import offload_routing
import offload_sharing
import offload_speed

from carpool.artefacts.files import write_text
from carpool.evaluate.results import provenance
from carpool_demo import TEXTS


def add(path: Path, part: str, found: dict[str, Any], name: str = "") -> None:
    """Put a part into the file of results; rows of speed beside those of other pieces."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    found = {**provenance(), **found}
    if part == "speed" and isinstance(older := content.get(part, {}).get("rows"), dict):
        found["rows"] = older | found["rows"]
    if name:
        content.setdefault(part, {})[name] = found
    else:
        content[part] = found
    write_text(path, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["routing", "quality", "sharing", "speed"])
    parser.add_argument("--output", type=Path, default=Path("docs/results/offload.json"))
    parser.add_argument("--model", help="folder; default: the reference model")
    parser.add_argument("--name", default="reference model")
    parser.add_argument("--text", type=Path, action="append", help="default: the demo's texts")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument(
        "--folder",
        type=Path,
        help="for files of some gigabytes, which stay",
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--piece", action="append", choices=list(offload_speed.PIECES), help="default: all")
    given = parser.parse_args()
    files = given.text or sorted(TEXTS.glob("*.jsonl"))
    begun = time.monotonic()
    if given.part == "routing":
        add(
            given.output,
            "routing",
            offload_routing.study(given.model, files, given.requests),
            given.name,
        )
    elif given.part == "quality":
        add(given.output, "quality", offload_quality.study(files))
    elif given.folder is None:
        parser.error(f"{given.part} needs --folder, for files of some gigabytes")
    elif given.part == "sharing":
        add(given.output, "sharing", offload_sharing.study(given.folder, files))
    else:
        for piece in given.piece or offload_speed.PIECES:
            add(given.output, "speed", offload_speed.study(given.folder, files, given.layers, [piece]))
    print(f"{given.part}: {time.monotonic() - begun:.0f} s, {given.output}")


if __name__ == "__main__":
    main()
