"""The smallest files of results that a report shows, with every number that it reads, and ways to break them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

SCHEMA = 1
ODD: tuple[Any, ...] = (None, -1, -0.5, 1.5, 1e200, 10**200, "x", True, [], {}, [1], {"value": 1})
LAYERS, EXPERTS = 2, 3


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def _row(policy: str, kl: float) -> dict[str, Any]:
    shares = {name: metric(0.5) for name in ("union_share", "bytes_share", "displaced_mass", "expected_loss")}
    return {
        "policy": policy, "batch": 4, "batches": 10, "decoded_tokens": 240, "pairs": 2.0, "kl": metric(kl),
        "union": metric(3.0), "perplexity_ratio": metric(1.1), "top1_agreement": metric(0.8), **shares,
        "union_by_layer": [2.5] * LAYERS,
        "details": {
            "expert_use": {domain: [[5, 6, 7] for _ in range(LAYERS)] for domain in "ab"},
            "displaced_histogram": [3, 2, 0],
            "worst_rows": [{"displaced_mass": 0.7, "kl": 0.2, "domain": "a", "text": "one two"}],
        },
    }  # fmt: skip


def evaluation() -> dict[str, Any]:
    """Of `carpool evaluate --json`."""
    return {
        "schema": SCHEMA, "kind": "carpool evaluation", "seed": 0, "findings": ["said"],
        "model": {"name": "m", "architecture": "A", "experts": EXPERTS, "layers": LAYERS, "top_k": 2,
                  "expert_bytes": 1e6, "other_bytes": 2e6},
        "texts": [{"name": "a.txt", "sha256": "0"}],
        "results": [_row("stock", 0.0), _row("oea(k0=1)", 0.02), _row("topk(k=1)", 0.3)],
    }  # fmt: skip


def blocks() -> dict[str, Any]:
    """Of `carpool evaluate --decode block-diffusion --json`."""
    made = evaluation() | {"kind": "carpool block diffusion"}
    for row in made["results"]:
        del row["details"]
        row["masked_tokens"] = row.pop("decoded_tokens")
        row["decoding"] = {name: metric(0.75) for name in ("union", "union_share", "tokens_per_forward", "agreement")}
        row["decoding"] |= {"followed_agreement": None, "perplexity_ratio": metric(1.2)}
    return made


def interference() -> dict[str, Any]:
    """Of `carpool evaluate --interference --json`."""
    spread = {"mean": 0.01, "quantiles": {"p99": 0.1, "p100": 0.4}, "histogram": [1, 2, 3]}
    row = {
        "policy": "oea(k0=1)", "kl": spread, "kl_between_co_batches": spread, "flipped_greedy": 0.1,
        "unstable_greedy": 0.2, "worst_displaced_mass": 0.3, "worst_token": {"text": "one"},
    }  # fmt: skip
    return {"schema": SCHEMA, "kind": "carpool interference", "histogram_edges": [0.01, 0.1],
            "results": [copy.deepcopy(row)]}  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something lies in a file."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inside:
        yield (*at, name)
        yield from places(one, (*at, name))


def broken(content: dict[str, Any], at: tuple[Any, ...], change: Any = KeyError) -> dict[str, Any]:
    """A copy with something else at a place, or without it."""
    made = copy.deepcopy(content)
    holder = made
    for name in at[:-1]:
        holder = holder[name]
    if change is KeyError:
        del holder[at[-1]]
    else:
        holder[at[-1]] = change
    return made


def broken_somewhere(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three places changed: an odd value, nothing, a number moved or with its sign turned."""
    made = content
    for _ in range(rng.randrange(1, 4)):
        at = rng.choice(list(places(made)) or [("results",)])
        value: Any = made
        for name in at:
            value = value[name]
        odd: list[Any] = [*ODD, KeyError]
        if isinstance(value, int | float):
            odd += [-value, value * rng.choice([0.5, 3, 1e6]), int(value), str(value)]
        if isinstance(value, list):
            odd += [value[:-1], value * 2, value[::-1]]
        made = broken(made, at, rng.choice(odd))
    return made
