"""Why uniform bits win on the second model, in docs/bytes.md: one code for all depths, and experts that are left out.

From the results of `expert_bytes.py`.
"""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/bytes.md"
BITS = (2, 3, 4)
PLANES, OWN = "planes at one depth", "uniform, groups of 64"
OURS, WHOLE = "depth", "depth, nothing left out"
HEADS = ["model", ">bits", ">planes lose", ">its own quantiser", ">over", ">KL of planes", ">of its own"]


def blocks() -> list[Block]:
    reference, second = load("expert-bytes.json"), load("expert-bytes-second.json")
    if reference is None or second is None:
        return []
    lines = [line for content in (reference, second) for line in of_model(content)]
    return [Block(PAGE, "bytes of one code", rows(HEADS, lines) + left_out(second))]


def of_model(content: dict[str, Any]) -> list[list[str]]:
    """Share of output energy that is lost at a number of bits, and KL at batch 16 where planes were measured alone."""
    lost, lines = content["lost"], []
    kl = {(one["method"], one["policy"][-2]): one["kl"]["value"] for one in content["cells"]["16"]["settings"]}
    for bits in BITS:
        planes, own = lost["nested-64"][str(bits)], lost[f"uniform-{bits}-64"][str(bits)]
        measured = [kl.get((method, str(bits))) for method in (PLANES, OWN)]
        shown = ["–" if measured[0] is None or one is None else f"{one:.5f}" for one in measured]
        name = "reference" if content["model"]["name"] == "reference model" else "second"
        lines.append([name, str(bits), f"{planes:.2%}", f"{own:.2%}", f"{planes / own:.1f}", *shown])
    return lines


def left_out(content: dict[str, Any]) -> str:
    """What `depth` needs with and without leaving experts out."""
    row = content["cells"]["16"]["needed"][-1]
    return (
        f"\nFor KL {row['kl']:g} `depth` needs {row['bytes'][OURS]:.1%} of the bytes on the second model, and "
        f"{row['bytes'][WHOLE]:.1%} where it leaves no expert out (`levels=[2, 3, 4, 5, 6]`).\n"
    )
