"""What the kernels' rounding of activations costs in quality: KL with the kernels beside KL in plain torch.

    carpool compress -o planes/
    python benchmarks/kernel_kl.py planes/ --output docs/results/kernel-kl.json

The same planes, plans and texts twice: experts computed by the kernels (on CPUs activations of 8 bits) and by plain
torch in float32. KL of either from the reference model with its own weights, in nats a token, and of the kernels from
plain torch; rows of prompts are read at the deepest depth. Held-out text, batches in lockstep, means over batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from engines import as_json
from reference import Reference

from carpool import parse
from carpool.artefacts.statistics import Statistics
from carpool.evaluate.intervals import estimate
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import LAYER_FIELDS, compare, forward
from carpool.experts.stored import NAMES
from carpool.hosts.transformers import find_layers, open_model
from carpool.kernels.experts import build
from carpool.routing.batch import Grouping

PLANS = (
    *(f"topk(k=8) | bits({depth})" for depth in (2, 3, 4, 5, 6)),
    *(f"depth(bytes={share})" for share in (0.16, 0.2, 0.25)),
)
BATCH, LENGTH, PROMPT = 16, 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("planes", type=Path, help="folder of `carpool compress -o`")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not build.ready():
        raise SystemExit("the kernels cannot be built here")
    reference, path = Reference(), given.planes / "experts.planes"
    sequences = reference.sequences(given.batches * BATCH, LENGTH, given.seed)
    layout = Layout(BATCH, LENGTH, PROMPT, Grouping.parse("batch"))
    kernels, plain = (open_model(given.planes).weights() for _ in range(2))
    for layer, (_, tensors) in zip(find_layers(plain), Statistics.by_layer(path), strict=True):
        assert layer.planes is not None
        layer.planes.fill(tensors, torch.device("cpu"), kernels=False)
    stats = Statistics.load(path, NAMES)
    content: dict[str, Any] = reference.facts(batch=BATCH, batches=given.batches, prompt=PROMPT, seed=given.seed)
    content |= {
        "instructions": build.instructions()[0],
        "depths": list(find_layers(plain)[0].planes.depths),
        "rows": [],
    }
    for plan in PLANS:
        sums: dict[str, list[float]] = {"plain": [], "kernels": [], "apart": []}
        read = whole = 0.0
        for ids_BT in sequences.ids_ST.split(BATCH):
            with torch.inference_mode():
                stock_RV = layout.logits(reference.model, ids_BT[:, :-1])
            targets_R = ids_BT[:, PROMPT + 1 :].flatten()
            how: dict[str, Any] = {"num_layers": len(reference.layers), "stats": stats}
            found, wanted = (forward(one, parse(plan), ids_BT[:, :-1], layout, **how) for one in (kernels, plain))
            for name, pair in (
                ("plain", (stock_RV, wanted.logits_RV)),
                ("kernels", (stock_RV, found.logits_RV)),
                ("apart", (wanted.logits_RV, found.logits_RV)),
            ):
                sums[name].append(float(compare(*pair, targets_R).kl_R.mean()))
            read += float(found.layers_LFM[:, LAYER_FIELDS.index("bytes")].sum())
            whole += float(found.layers_LFM[:, LAYER_FIELDS.index("natural_union")].sum())
        deepest = float(stats.for_layer(0)["depth_bytes"][-1])
        row: dict[str, Any] = {"plan": plan, "bits": 16 * deepest * read / whole}
        for name, values in sums.items():
            one = estimate(torch.tensor(values).double().numpy(), torch.ones(len(values)).double().numpy(), "log")
            row[name] = {"kl": one.value, "low": one.low, "high": one.high}
        content["rows"].append(row)
        print(row, flush=True)
    if given.output:
        given.output.write_text(as_json(content))


if __name__ == "__main__":
    main()
