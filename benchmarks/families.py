"""The families of the transformers host, measured on tiny models with random weights: `docs/results/families.json`.

    python benchmarks/families.py

Every family, in fp32 and bf16: does the router follow the rule that Carpool has for it, is the model untouched when
Carpool is off and at identity settings, and do its experts receive only what a small budget allows.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from family_matrix import NAMES, measure  # noqa: E402

from carpool.files import write_text  # noqa: E402
from carpool.hosts.transformers.refused import REFUSED  # noqa: E402

RESULTS = ROOT / "docs/results/families.json"
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        for dtype in DTYPES:
            rows.append(measure(name, dtype))
            print(name, rows[-1]["dtype"], rows[-1]["recomputed"], rows[-1]["recomputed_error"], flush=True)
    refused = [{"family": r.family, "module": module, "reason": r.reason} for module, r in REFUSED.items()]
    content = {
        "command": "python benchmarks/families.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": 0,
        "rows": rows,
        "refused": sorted(refused, key=lambda row: row["family"]),
    }
    write_text(RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
