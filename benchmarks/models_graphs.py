"""Mowst on Debian's packages: does a weak expert's confidence save reading of the graph, and what does it cost?

    python benchmarks/models_graphs.py WORK --output docs/results/models-graphs.json

WORK holds what `recipes/package_graph/build.py` made. Every method has the same settings to choose from, on the first
split of the nodes, by its accuracy there on nodes that are not judged, and as many steps on the graph. Beside Mowst's
forms stand its parts, a skip connection, and the same gate over experts that were trained apart. Nodes read are the
union of the two-hop fields of the nodes of a batch that the weak expert passes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from carpool import CarpoolError
from carpool.artefacts.files import write_text
from carpool.models.confidence import negentropy, variance
from carpool.models.gate import Gate, drawn
from carpool.models.graphs import answer_nodes

sys.path.append(str(Path(__file__).parents[1] / "recipes/package_graph"))

from train import Data, Setting, alone, made, mowst

SETTINGS = [Setting(0.01, 0.2), Setting(0.01, 0.5)]
PLAIN = ("mlp", "gcn", "sage", "skip")
FORMS = {
    "Mowst": (False, True), "Mowst, no gradient through C": (False, False),
    "Mowst*": (True, True), "Mowst*, no gradient through C": (True, False),
}  # fmt: skip
SHARES = (0.25, 0.5, 0.75)
BATCHES, TRIED = (1, 16, 256), 40  # nodes of a batch; batches that are read


def half(values: Tensor) -> float:
    return 1.96 * float(values.double().std()) / math.sqrt(len(values))


class Pair:
    """Two experts on one split: what each says of all nodes, and how sure the weak one is."""

    def __init__(self, data: Data, weak: torch.nn.Module, strong: torch.nn.Module, confidence: Any = None) -> None:
        self.data, self.weak, self.strong, self.confidence = data, weak, strong, confidence
        with torch.no_grad():
            self.weak_NC, self.strong_NC = weak(data.x_NF), strong(data.x_NF, data.sparse("gcn"))
        self.weak_right_N, self.strong_right_N = (
            (one.argmax(-1) == data.class_N).double() for one in (self.weak_NC, self.strong_NC)
        )

    def signals(self, logits_BC: Tensor) -> Tensor:
        """What the gate looks at: the trained confidence, or both dispersions."""
        if self.confidence is not None:
            return self.confidence(logits_BC).detach()
        p_BC = logits_BC.softmax(-1)
        return torch.stack([variance(p_BC), negentropy(p_BC)], dim=-1)

    def drawn_right(self) -> Tensor:
        """How often Mowst's draw is right at each node, in expectation."""
        c_N = self.signals(self.weak_NC).double()
        return c_N * self.weak_right_N + (1 - c_N) * self.strong_right_N

    def mixed_right(self) -> Tensor:
        c_N1 = self.signals(self.weak_NC).unsqueeze(-1)
        mixed_NC = c_N1 * self.weak_NC.softmax(-1) + (1 - c_N1) * self.strong_NC.softmax(-1)
        return (mixed_NC.argmax(-1) == self.data.class_N).double()

    def read(self, keep: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Mean nodes read of batches of nodes to judge on, and what the strong expert on all of them would read."""
        data, told = self.data, {}
        order = data.judge_N.nonzero().flatten()
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
        for size in BATCHES:
            parts = order.split(size)[: min(TRIED, max(1, len(order) // size))]
            counts = []
            for nodes_B in parts:
                some, every = (
                    answer_nodes(self.weak, self.strong, who, data.x_NF, data.edges_2M, nodes_B, weight_M=data.weight_M)
                    for who in (keep, lambda logits_BC: torch.zeros(len(logits_BC), dtype=torch.bool))
                )
                counts.append((some.read, every.read, float(some.passed_B.double().mean())))
            mean = [sum(column) / len(counts) for column in zip(*counts, strict=True)]
            told[str(size)] = {"read": round(mean[0], 1), "always": round(mean[1], 1), "passed": round(mean[2], 4)}
        return told


def trained(work: Path, method: str, setting: Setting, split: int) -> tuple[Any, float, Tensor]:
    """A method's experts, its accuracy on the nodes to choose by, and where it is right."""
    torch.manual_seed(split)
    edges = "needs" if method.endswith("needs") else "edges"
    data = Data.load(work, split, edges)
    if method in FORMS:
        star, through = FORMS[method]
        model = mowst(data, setting, star=star, through=through)
        pair = Pair(data, model.weak, model.strong, model.confidence)
        right_N = pair.mixed_right() if star else pair.drawn_right()
        return pair, float(right_N[data.choose_N].mean()), right_N
    kind = method.split()[0]
    model = alone(data, made(data, kind, setting), kind, setting)
    with torch.no_grad():
        right_N = (model(data.x_NF, data.sparse(kind)).argmax(-1) == data.class_N).double()
    return model, float(right_N[data.choose_N].mean()), right_N


def curve(pair: Pair, label: str) -> list[dict[str, Any]]:
    """The library's gate at some shares: calibrated on nodes to choose by, judged on others."""
    data = pair.data
    signals_N = pair.signals(pair.weak_NC)
    weak, strong = (one[data.judge_N] for one in (pair.weak_right_N, pair.strong_right_N))
    better_N = (strong - weak).clamp_min(0).sort(descending=True).values / len(weak)
    made = []
    for share in SHARES:
        line: dict[str, Any] = {"method": label, "share": share}
        chosen = (signals_N[data.choose_N], pair.weak_right_N[data.choose_N], pair.strong_right_N[data.choose_N])
        try:
            gate = Gate.calibrate(*chosen, max_cost=share)
        except CarpoolError as refusal:
            made.append(line | {"refused": str(refusal)})
            continue
        keep_N = gate.keep(signals_N)[data.judge_N]
        right_N = torch.where(keep_N, weak, strong)
        passed = float((~keep_N).double().mean())
        gain_N = right_N - (passed * strong + (1 - passed) * weak)
        made.append(line | {
            "passed": round(passed, 4), "right": round(float(right_N.mean()), 4),
            "above_random": round(float(gain_N.mean()), 4), "above_random_half_width": round(half(gain_N), 4),
            "oracle": round(float(weak.mean() + better_N[: round(passed * len(weak))].sum()), 4),
            "read": pair.read(lambda logits_BC, gate=gate: gate.keep(pair.signals(logits_BC))),
        })  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    work, begun = arguments.work, time.perf_counter()
    kept = work / "graphs-tuning.json"
    tuned: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    methods = [*PLAIN, "gcn needs", *FORMS]
    for method in methods:
        found = tuned.setdefault(method, [])
        for setting in SETTINGS[len(found) :]:
            found.append(trained(work, method, setting, 0)[1])
            write_text(kept, json.dumps(tuned))
        Console().print(
            method, [round(one, 4) for one in found], f"{time.perf_counter() - begun:.0f} s", soft_wrap=True
        )
    best = {method: SETTINGS[max(range(len(SETTINGS)), key=tuned[method].__getitem__)] for method in methods}
    right: dict[str, list[Tensor]] = {}
    parts: dict[str, dict[str, list[float]]] = {}
    curves: list[dict[str, Any]] = []
    draws: list[dict[str, Any]] = []
    for split in range(arguments.splits):
        models = {}
        for method in methods:
            models[method], _, right_N = trained(work, method, best[method], split)
            judge_N = Data.load(work, split).judge_N
            right.setdefault(method, []).append(right_N[judge_N])
        for method in FORMS:
            pair = models[method]
            told = parts.setdefault(method, {name: [] for name in ("weak", "strong", "mixed", "drawn", "confidence")})
            confidence_N = pair.signals(pair.weak_NC)
            for name, value_N in (
                ("weak", pair.weak_right_N), ("strong", pair.strong_right_N), ("mixed", pair.mixed_right()),
                ("drawn", pair.drawn_right()), ("confidence", confidence_N),
            ):  # fmt: skip
                told[name].append(float(value_N[pair.data.judge_N].mean()))
            if split == 0:
                generator = torch.Generator().manual_seed(0)
                keep = lambda logits_BC, pair=pair: drawn(pair.signals(logits_BC), generator)  # noqa: B023, E731
                draws.append({"method": method, "read": pair.read(keep)})
                curves += curve(pair, method)
        if split == 0:
            for label, strong in (("MLP, then GCN", "gcn"), ("MLP, then GCN on needs", "gcn needs")):
                data = Data.load(work, split, "needs" if strong == "gcn needs" else "edges")
                curves += curve(Pair(data, models["mlp"], models[strong]), label)
    reference = torch.cat(right["gcn"])
    rows = []
    for method in methods:
        all_N = torch.cat(right[method])
        gain_N = all_N - reference
        rows.append({
            "method": method, "right": round(float(all_N.mean()), 4), "half_width": round(half(all_N), 4),
            "splits": [round(float(one.mean()), 4) for one in right[method]],
            "above_gcn": round(float(gain_N.mean()), 4), "above_gcn_half_width": round(half(gain_N), 4),
            "setting": asdict(best[method]),
            **{name: round(sum(values) / len(values), 4) for name, values in parts.get(method, {}).items()},
        })  # fmt: skip
        Console().print(rows[-1], soft_wrap=True)
    result = {
        "graph": json.loads((work / "graph.json").read_text()), "settings": len(SETTINGS), "splits": arguments.splits,
        "rows": rows, "draws": draws, "curves": curves,
    }  # fmt: skip
    write_text(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
