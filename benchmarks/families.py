"""The families of the transformers host, measured on tiny models with random weights: `docs/results/families.json`.

    python benchmarks/families.py
    python benchmarks/families.py --only diffusion_gemma        # this family's rows anew, the others as they are

Every family, in fp32 and bf16: does the router follow the rule that Carpool has for it, is the model untouched when
Carpool is off and at identity settings, and do its experts receive only what a small budget allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from family_matrix import NAMES, measure

from carpool.artefacts.files import write_text
from carpool.hosts.transformers.refused import REFUSED

RESULTS = ROOT / "docs/results/families.json"
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES, action="append", help="measure these, keep the other rows")
    names = parser.parse_args().only or NAMES
    made = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": 0}
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if names is not NAMES:
        committed = json.loads(RESULTS.read_text())
        if {key: committed[key] for key in made} != made:
            raise SystemExit(f"the other rows were not measured with {made}; run without --only")
        rows += [row for row in committed["rows"] if row["name"] not in names]
    for name in names:
        for dtype in DTYPES:
            rows.append(measure(name, dtype))
            print(name, rows[-1]["dtype"], rows[-1]["recomputed"], rows[-1]["recomputed_error"], flush=True)
    refused = [{"family": r.family, "module": module, "reason": r.reason} for module, r in REFUSED.items()]
    content = {
        "command": "python benchmarks/families.py",
        **made,
        "rows": sorted(rows, key=lambda row: NAMES.index(row["name"])),
        "refused": sorted(refused, key=lambda row: row["family"]),
    }
    write_text(RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
