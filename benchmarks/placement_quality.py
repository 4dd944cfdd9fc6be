"""What caps per device cost in quality, beside the peak that they lower: XShare-EP on the reference model.

    python benchmarks/placement_quality.py --output docs/results/placement-quality.json

Held-out texts decode in lockstep, experts lie in order on the devices. Beside caps per device stand a budget for all
devices together (XShare) and fewer experts for every token, on the same text.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from reference import Reference

from carpool import Batch, Grouping, Outcome, parse
from carpool.artefacts.texts import load_texts
from carpool.evaluate.intervals import estimate
from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.loop import Loop
from carpool.evaluate.measure import in_order, parts
from carpool.evaluate.metrics import results
from carpool.evaluate.results import write_rows
from carpool.evaluate.sequences import draw

PLANS = (
    "xshare_expert_parallel(0.25)", "xshare_expert_parallel(0.5)", "xshare_expert_parallel(0.25, warmup=0)",
    "xshare_expert_parallel(0.5, warmup=0)", "xshare(budget=16)", "xshare(budget=32)", "oea(k0=2)", "topk(k=4)",
)  # fmt: skip
SHOWN = ("union", "kl", "top1_agreement", "displaced_mass", "perplexity_ratio")
PREFILL, DECODED = 32, 96


class Peaks:
    """Experts of the busiest device in every decoding step, mean over layers and steps, one number a batch."""

    def __init__(self, device_E: Tensor) -> None:
        self._on_ED = torch.nn.functional.one_hot(device_E).double()
        self._passes: list[Tensor] = []

    def begin(self, layout: Layout, part: Part) -> None:
        self._layout, self._layers = layout, list[Tensor]()

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        peak_S = (outcome.union_SE.double() @ self._on_ED).amax(-1)
        steps = self._layout.steps
        self._layers.append(peak_S.view(-1, steps + 1)[:, :steps].mean(1))

    def finish(self, part: Part, found: Any) -> None:
        self._passes.append(torch.stack(self._layers).mean(0))

    def estimate(self) -> dict[str, Any]:
        peak_M = torch.cat(self._passes).numpy()
        return asdict(estimate(peak_M, np.ones(len(peak_M))))


def table(reference: Reference, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for stock and for every plan."""
    layout = Layout(given.batch, PREFILL + DECODED, PREFILL, Grouping.parse("batch"))
    sequences = draw(
        load_texts(reference.paths), reference.tokenizer, count=given.batches * given.batch, length=layout.positions,
        seed=given.seed, batches=given.batches,
    )  # fmt: skip
    device_E = in_order(reference.moe.experts, given.devices)
    loop = Loop(
        reference.model, reference.moe, layout, parts(reference.model, sequences, layout, given.batches),
        sequences.domains, stats=reference.stats, device_E=device_E,
    )  # fmt: skip
    peaks = [Peaks(device_E) for _ in (None, *PLANS)]
    found = results(loop.run([parse(text) for text in PLANS], watchers=peaks))
    return [
        {"policy": one.measured.name, "changed_rows": one.measured.changed_rows,
         "tokens": int(one.measured.tokens_M.sum()), "peak": peak.estimate(),
         **{name: asdict(getattr(one, name)) for name in SHOWN}}
        for one, peak in zip(found, peaks, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    reference = Reference()
    write_rows(given.output, table(reference, given), kind="carpool placement quality", **reference.head(given))


if __name__ == "__main__":
    main()
