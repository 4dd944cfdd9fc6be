"""The JSON form of an evaluation: what was measured, on what, with which versions."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import carpool
from carpool.artefacts.files import sha256_file, write_text
from carpool.artefacts.origin import now, version
from carpool.evaluate.details import Details
from carpool.evaluate.intervals import FEWEST, LEVEL, METHOD
from carpool.evaluate.metrics import Result

SCHEMA = 1
Decode = Callable[[list[int]], str]


def provenance() -> dict[str, Any]:
    """Versions, the time, and the git commit (None outside a checkout, `-dirty` with changes)."""
    import torch
    import transformers

    return {
        "created": now(),
        "versions": {
            "carpool": version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    here = Path(carpool.__file__).parent
    try:
        # an installed copy may lie inside somebody else's repository: only tracked files say which commit this is
        for command in ("ls-files --error-unmatch __init__.py", "describe --always --dirty --abbrev=40 --exclude=*"):
            done = subprocess.run(["git", *command.split()], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def text_facts(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Name and hash of every text file."""
    return [{"name": path.name, "sha256": sha256_file(path)} for path in paths]


def as_dict(result: Result, decode: Decode | None = None) -> dict[str, Any]:
    """One row of the results; `decode` shows the worst rows' tokens as text."""
    one = result.measured
    layout = one.layout
    estimates = (
        "union", "union_share", "bytes", "bytes_share", "displaced_mass", "expected_loss", "kl", "top1_agreement",
        "perplexity", "perplexity_ratio",
    )  # fmt: skip
    return {
        "policy": one.name,
        "group": str(layout.grouping),
        "batch": layout.batch_size,
        "batches": one.batches,
        "decoded_tokens": int(one.tokens_M.sum()),
        "changed_rows": one.changed_rows,
        "coreset": result.coreset,
        **{name: asdict(getattr(result, name)) for name in estimates},
        "natural_union": result.natural_union,
        "pairs": result.pairs,
        "overflow": result.overflow,
        "surrogates": result.surrogates,
        "domains": {
            name: {"perplexity": asdict(perplexity), "perplexity_ratio": asdict(ratio)}
            for name, (perplexity, ratio) in result.domains.items()
        },
        "union_by_layer": result.union_by_layer,
        "stock_union_by_layer": result.stock_union_by_layer,
        **({} if one.details is None else {"details": _details(one.details, one.domains, decode)}),
    }


def _details(details: Details, domains: Sequence[str], decode: Decode | None) -> dict[str, Any]:
    worst = [
        {
            "displaced_mass": row.displaced,
            "kl": row.kl,
            "domain": domains[row.domain],
            "text": None if decode is None else decode(list(row.context)),
        }
        for row in details.worst
    ]
    return {
        "expert_use": dict(zip(domains, details.use_DLE.tolist(), strict=True)),
        "displaced_histogram": details.histogram_B.tolist(),
        "worst_rows": worst,
    }


def write(path: Path, results: Sequence[Result], *, decode: Decode | None = None, **facts: Any) -> None:
    """Write an evaluation in one piece; `facts` (model, texts, seed, arguments, ...) go beside the results."""
    write_rows(path, [as_dict(result, decode) for result in results], kind="carpool evaluation", **facts)


def write_rows(path: Path, results: Sequence[dict[str, Any]], *, kind: str, **facts: Any) -> None:
    """Write results of any kind, a line each, under what they have in common."""
    content = {
        "schema": SCHEMA,
        "kind": kind,
        **provenance(),
        **facts,
        "intervals": {"level": LEVEL, "method": METHOD, "fewest_batches": FEWEST},
    }
    head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
    rows = ",\n  ".join(json.dumps(result, allow_nan=False) for result in results)
    write_text(path, f'{head},\n "results": [\n  {rows}\n ]\n}}\n')
