"""The families of the transformers host: `python benchmarks/families.py`."""

from __future__ import annotations

from typing import Any

from generators import Block, load, rows

PAGE = "docs/families.md"
HEADS = ("family", "model", "rule", "recomputed fp32", "bf16", "off and identity", ">rows changed", "experts receive")
PROMISES = ("off_identical", "identity_identical", "stock_afterwards")


def blocks() -> list[Block]:
    content = load("families.json")
    if content is None:
        return []
    made = f"transformers {content['transformers']}, torch {content['torch']}, seed {content['seed']}"
    counted = f"{len({row['family'] for row in content['rows']})} families, measured with {made}."
    refused = ((f"`{row['family']}`", f"`{row['module']}`", row["reason"]) for row in content["refused"])
    return [
        Block(PAGE, "matrix", f"{counted}\n\n{table(content['rows'])}"),
        Block(PAGE, "notes", notes(content["rows"])),
        Block(PAGE, "refused", rows(("family", "module", "why"), refused)),
    ]


def table(measured: list[dict[str, Any]]) -> str:
    """One line a family or variant; a promise that does not hold is spelled out."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measured:
        by_name.setdefault(row["name"], {})[row["dtype"]] = row
    return rows(HEADS, (_cells(name, found["float32"], found["bfloat16"]) for name, found in by_name.items()))


def notes(measured: list[dict[str, Any]]) -> str:
    """What users of single families should know."""
    found = {(row["family"], row["note"]) for row in measured if row["note"]}
    return "".join(f"- `{family}`: {note}.\n" for family, note in sorted(found))


def _cells(name: str, fp32: dict[str, Any], bf16: dict[str, Any]) -> list[str]:
    both = (fp32, bf16)
    variant = name.partition(",")[2]
    broken = [f"{row['dtype']}: not {key}" for row in both for key in PROMISES if not row[key]]
    allowed = all(row["only_allowed"] and row["weights_add_up"] for row in both)
    return [
        f"`{fp32['family']}`{',' if variant else ''}{variant}",
        f"`{fp32['model']}`",
        fp32["rule"],
        *(row["recomputed"] if row["recomputed"] == "exact" else f"{row['recomputed_error']:.0e}" for row in both),
        "; ".join(broken) or "bit for bit",
        f"{fp32['changed_rows']} and {bf16['changed_rows']} of {fp32['rows']}",
        "only what is allowed" if allowed else "**more than is allowed**",
    ]
