"""One MoE layer on a GPU with torch and Triton and nothing else: what routing in two launches costs there, and what
experts in planes that are read at a depth.

    python benchmarks/gpu_layer.py --output gpu-layer.json     # agreement and times, on a GPU
    python benchmarks/gpu_layer.py --compile                   # registers and shared memory, on any machine
    TRITON_INTERPRET=1 python benchmarks/gpu_layer.py --sizes tiny   # a rehearsal without a GPU; NumPy 2.5 breaks it

`agreement`: experts, weights and counters beside the general path's, from the same scores. `launches`: of our kernels,
beside the operations of the general path and of torch's own scoring and top-k, each of them a kernel at least. `times`:
microseconds of a layer inside a CUDA graph: the two launches, the general path, torch's own scoring and top-k, and
reading the experts of the batch (two matrix products over as many experts as native routing, or the coreset, would
read).

The second half (`gpu_experts.py`): `experts_error`, the kernels that read experts beside plain torch; microseconds by
rows, distinct experts and depth, and bytes of weights a second as a share of what a copy in the device's memory moves.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from carpool import Batch, Plan, RouteSpec, Routing, parse
from carpool.kernels.launch import Fused, Scratch
from carpool.plans.counters import FIELDS, SHARES, measured
from carpool.plans.pipeline import Outcome, decide, scored

WIDTH = 64  # of the router's input where only its shape matters
WORST = 0.02  # of what kernels read, beside plain torch in float32, relative: activations are bfloat16
REPEATS, REPLAYS = 16, 30  # of a layer in a graph; of the graph


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and its rule."""

    hidden: int
    intermediate: int
    experts: int
    rule: RouteSpec


SIZES = {
    "olmoe-1b-7b": Layer(2048, 1024, 64, RouteSpec(top_k=8, renormalize=False)),
    "qwen3-30b-a3b": Layer(2048, 768, 128, RouteSpec(top_k=8)),
    "gpt-oss-120b": Layer(2880, 2880, 128, RouteSpec(top_k=4, scoring="softmax_after_topk")),
    "deepseek-v3": Layer(
        7168, 2048, 256,
        RouteSpec(top_k=8, scoring="sigmoid", num_groups=8, kept_groups=4, group_score="top2", scaling=2.5),
    ),
    "qwen3-next-80b-a3b": Layer(2048, 512, 512, RouteSpec(top_k=10)),
    "largest": Layer(2048, 512, 512, RouteSpec(top_k=16)),
    "tiny": Layer(64, 32, 16, RouteSpec(top_k=4)),
}  # fmt: skip
POLICIES = (
    "xshare(0.25)", "xshare(0.25, warmup=0, utility='squared')", "oea(2)", "des_vote(beta=0.5)", "lynx(0.25)",
    "random(0.25)", "sere(1)", "base(0.25)", "surrogate(0.25)", "topk(2)", "top_p(0.4)", "tail_mass(0.2)",
    "layer_threshold(0.05)", "allow_list(size=0.5)",
)  # fmt: skip
ROWS = (1, 16, 64, 256, 1024)


def statistics(experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Of a layer, made up: all that any policy asks for."""

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    return {
        "similarity_frobenius": numbers(experts, experts),
        "norm_weight": numbers(experts, WIDTH) / WIDTH,
        "norm_bias": numbers(experts),
        "norm_scale": torch.tensor(1.0),
        "surrogate_energy": numbers(experts),
        "surrogate_unexplained": numbers(experts),
        "sensitivity": torch.tensor(0.1),
        "easy_ep": numbers(experts),
    }


@dataclass(eq=False)
class Call:
    """One call of a layer's routing, either way."""

    plan: Plan
    layer: Layer
    batch: Batch
    logits_NE: Tensor
    hidden_NH: Tensor
    stats: dict[str, Tensor]
    fused: Fused
    native: Routing
    totals_F: Tensor

    @classmethod
    def of(cls, text: str, layer: Layer, rows: int, groups: int, device: torch.device, seed: int = 0) -> Call:
        generator = torch.Generator().manual_seed(seed)
        plan = parse(text + " | floor(0.3)").for_serving()
        found = plan.policy.prepare(statistics(layer.experts, generator))
        stats = {name: tensor.to(device) for name, tensor in found.items()}
        logits_NE = (torch.randn(rows, layer.experts, generator=generator) * 2).to(device)
        hidden_NH = torch.randn(rows, WIDTH, generator=generator).to(device)
        group_N = (torch.arange(rows) * groups // rows).to(device)
        exempt_N = (torch.arange(rows) % 16 == 15).to(device)
        batch = Batch.of(rows, device=device, group_N=group_N, num_groups=groups, exempt_N=exempt_N)
        scratch = Scratch(rows, groups, layer.experts, device)
        fused = Fused(plan, layer.rule, layer.experts, stats, scratch)
        totals_F = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        return cls(
            plan, layer, batch, logits_NE, hidden_NH, stats, fused, layer.rule.native(logits_NE), totals_F
        )  # fmt: skip

    def launches(self, scores: tuple[Tensor, Tensor] | None = None) -> Routing:
        policy: Any = self.plan.policy
        energy_NE = policy.energy_NE(self.hidden_NH, self.stats) if policy.needs_hidden else None
        return self.fused(
            self.logits_NE, self.native, self.batch, self.totals_F, scores=scores, energy_NE=energy_NE
        )  # fmt: skip

    def general(self) -> tuple[Outcome, Tensor]:
        scores = scored(self.layer.rule, self.logits_NE)
        outcome = decide(
            self.plan, self.layer.rule, self.logits_NE, *scores, self.batch, native=self.native, stats=self.stats,
            hidden_NH=self.hidden_NH,
        )  # fmt: skip
        return outcome, measured(self.batch, outcome)


def agreement(call: Call) -> dict[str, Any]:
    """How far the launches and the general path are apart, from the same scores."""
    outcome, expected_F = call.general()
    theirs = outcome.routing
    call.totals_F.zero_()
    ours = call.launches(scored(call.layer.rule, call.logits_NE))
    apart_NK = (ours.weights_NK.view(torch.int32).long() - theirs.weights_NK.view(torch.int32).long()).abs()
    counts = [place for place, name in enumerate(FIELDS) if name not in SHARES]
    return {
        "rows_changed": int(outcome.changed_N.sum()),
        "rows_with_other_experts": int((ours.ids_NK != theirs.ids_NK).any(-1).sum()),
        "ulp": int(apart_NK.max()),
        "counters_equal": torch.equal(call.totals_F[counts], expected_F[counts]),
    }


def times(call: Call) -> dict[str, float]:
    """Microseconds a layer inside a CUDA graph."""
    layer, rule = call.layer, call.layer.rule
    outcome, _ = call.general()
    natural, union = int(outcome.natural_SE.sum()), int(outcome.union_SE.sum())
    spread: dict[str, Any] = {"dtype": torch.bfloat16, "device": call.logits_NE.device}
    up_EHI = torch.randn(layer.experts, layer.hidden, 2 * layer.intermediate, **spread)
    down_EIH = torch.randn(layer.experts, layer.intermediate, layer.hidden, **spread)
    given_NH = torch.randn(len(call.logits_NE), layer.hidden, **spread)

    def experts(count: int) -> Callable[[], Any]:
        each = min(len(given_NH), 16)  # rows an expert; as long as they are few, reading its weights is what takes time
        given_UNH = given_NH[:each].expand(count, -1, -1)
        return lambda: torch.bmm(torch.bmm(given_UNH, up_EHI[:count])[..., : layer.intermediate], down_EIH[:count])

    found = {
        "two_launches": in_graph(call.launches),
        "general_path": in_graph(call.general),
        "scores_and_top_k": in_graph(lambda: rule.native(call.logits_NE)),
        "experts_natural": in_graph(experts(natural)),
        "experts_shared": in_graph(experts(union)),
    }
    share = found["two_launches"] / (found["scores_and_top_k"] + found["experts_natural"])
    return found | {"natural_union": natural, "union": union, "share_of_layer": share}


def in_graph(run: Callable[[], Any]) -> float:
    """Microseconds of one run among many in a recorded graph, the median over replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    took = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) * 1e3 / REPEATS)
    return sorted(took)[len(took) // 2]


def routing(sizes: list[str], rows: list[int], device: torch.device, policies: list[str]) -> Iterator[dict[str, Any]]:
    """A line for every layer, number of rows and policy; times for one policy a layer."""
    from gpu_launches import launches

    for name in sizes:
        for count in rows:
            for text in policies:
                for groups in (1, count):
                    call = Call.of(text, SIZES[name], count, groups, device)
                    line = {"layer": name, "rows": count, "policy": str(call.plan), "groups": groups}
                    line |= agreement(call) | launches(call)
                    if device.type == "cuda" and groups == 1 and text == policies[0]:
                        line["microseconds"] = times(call)
                    yield line


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile for GPUs that need not be here")
    parser.add_argument("--sizes", nargs="+", default=[name for name in SIZES if name != "tiny"], choices=SIZES)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--rows", nargs="+", type=int, default=None)
    parser.add_argument("--halves", nargs="+", default=["routing", "experts"], choices=["routing", "experts"])
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> int:
    given = options()
    if given.compile:
        from gpu_ahead import compiled, compiled_experts

        made = {
            "routing": lambda: compiled(given.sizes, given.policies),
            "experts": lambda: compiled_experts(given.sizes),
        }
        lines = chain.from_iterable(made[half]() for half in given.halves)
    else:
        from gpu_experts import reading
        from triton import knobs

        cuda = torch.cuda.is_available()
        if not cuda and not knobs.runtime.interpret:
            raise SystemExit("no GPU here: set TRITON_INTERPRET=1 to rehearse, or give --compile")
        rows = given.rows or (list(ROWS) if cuda else [5])
        device = torch.device("cuda" if cuda else "cpu")
        halves = {
            "routing": lambda: routing(given.sizes, rows, device, given.policies),
            "experts": lambda: reading(given.sizes, given.rows, device),
        }
        lines = chain.from_iterable(halves[half]() for half in given.halves)
    found = []
    for line in lines:
        found.append(line)
        print(json.dumps(line), flush=True)
    if given.output:
        import triton

        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        about = {"machine": machine, "python": platform.python_version(), "torch": torch.__version__}
        content = {"command": " ".join(sys.argv), **about, "triton": triton.__version__, "lines": found}
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    wrong = [
        line for line in found
        if line.get("rows_with_other_experts") or not line.get("counters_equal", True)
        or line.get("experts_error", 0) > WORST
    ]  # fmt: skip
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
