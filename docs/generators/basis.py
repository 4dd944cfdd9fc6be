"""Surrogates through a basis of inputs that a layer shares: tried on train text, and dropped."""

from __future__ import annotations

import json

from generators import Block, rows
from generators.surrogates import PAGE, RESULTS


def blocks() -> list[Block]:
    path = RESULTS / "design/basis.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    heads = ("", ">energy explained, by layer", ">bytes, in experts", ">KL, nats/token")
    lines = [
        [
            row["label"],
            ", ".join(f"{share:.2f}" for share in row["explained"]),
            f"{row['bytes']:.1f}",
            f"{row['kl']:.4f}",
        ]
        for row in content["rows"]
    ]
    said = (
        f"Budget {content['budget']} of 64, batch {content['batch']}, {content['decoded_tokens']:,} decoded tokens of "
        f"train text, one run, no intervals; maps fitted to {content['fit_tokens']:,} other tokens."
    )
    return [Block(PAGE, "basis", f"{rows(heads, lines)}\n{said}\n")]
