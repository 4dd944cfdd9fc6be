"""Sharing that knows what is in memory, and experts that never leave it, on the reference model: for `offload.py`.

The model with its experts rounded into planes, as `carpool compress` writes it, and `carpool.offload` beside
`carpool.share`. Held texts are decoded step by step under teacher forcing, as many sequences at a time as share.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from offload_quality import DEPTHS, GROUP, decode
from offload_routing import BATCH, sequences

import carpool
from carpool.artefacts.statistics import Statistics
from carpool.offloading.bootstrap import ratio
from carpool_demo import MODEL

TOKENS, BATCHES = 64, 2
PLANS = ("", *(f"xshare(budget={part}, warmup=0)" for part in (0.75, 0.625, 0.5, 0.375, 0.25)))
FREE = tuple(f"xshare(budget={count}, warmup=0)" for count in (4, 8, 12, 16, 24))
SHARES = (0.25, 0.5)
OUTLIERS = 2  # experts a layer


def study(folder: Path, files: Sequence[Any]) -> dict[str, Any]:
    """Loss and bytes of sharing, blind and knowing, and of misses read shallow with and without outliers pinned."""
    planes = folder / "planes"
    if not planes.exists():
        command = "from carpool.cli import main; main()"
        given = ["--method", "round", "--depths", ",".join(map(str, DEPTHS)), "--group", str(GROUP), "--tokens", "4000"]
        subprocess.run(
            [sys.executable, "-c", command, "compress", str(MODEL), "--output", str(planes), *given],
            check=True,
        )
    with carpool.offload(planes, "1GB") as run:
        tokenizer, geometry = run.tokenizer, run.experts.store.geometry
        ids_RT = sequences(tokenizer, files, BATCH * BATCHES)[:, :TOKENS]
        stock = [decode(run.model, ids_BT) for ids_BT in ids_RT.split(BATCH)]
    stats = Statistics.load(planes / "experts.planes")
    outliers = {
        index: stats.for_layer(index)["depth_energy"].topk(OUTLIERS).indices.tolist() for index in geometry.layers
    }
    whole = geometry.read(0, geometry.deepest) * len(geometry.layers) * geometry.experts
    rows: list[dict[str, Any]] = []

    def add(share: float, plan: str, on_miss: str, free: bool, pinned: Mapping[int, list[int]]) -> None:
        options = {"cache": "lru", "prefetch": False, "on_miss": on_miss, "resident_free": free, "pinned": pinned}
        lost, size, uses, hits = [], 0, 0, 0
        for ids_BT, logs in zip(ids_RT.split(BATCH), stock, strict=True):
            with carpool.offload(planes, int(share * whole), **options) as run:
                if plan:
                    with carpool.share(run.model, plan):
                        made = decode(run.model, ids_BT)
                else:
                    made = decode(run.model, ids_BT)
                lost.append((logs.exp() * (logs - made)).sum())
                size, uses, hits = size + run.experts.bytes_read, uses + run.totals.uses, hits + run.totals.hits
        kl, low, high = ratio(torch.stack(lost).double(), torch.full((BATCHES,), float(BATCH * TOKENS)))
        rows.append({
            "memory": share, "policy": plan, "on_miss": on_miss, "free": free, "pinned": bool(pinned), "kl": kl,
            "low": low, "high": high, "bytes_per_token": size / ids_RT.numel(), "hit_rate": hits / uses,
            "experts_read": (uses - hits) / (BATCHES * TOKENS * len(geometry.layers)),
        })  # fmt: skip
        print(rows[-1], flush=True)

    for share in SHARES:
        for plan in PLANS:
            add(share, plan, "exact", False, {})
        for plan in FREE:
            add(share, plan, "exact", True, {})
        for on_miss in ("depth(3)", "depth(2)", "depth([6, 2], [0.5])"):
            for pinned in ({}, outliers):
                add(share, "", on_miss, False, pinned)
    return {"batch": BATCH, "batches": BATCHES, "tokens": TOKENS, "outliers": outliers, "rows": rows}
