"""Where experts live: what every planner does to recorded routing, beside controls, and what published claims come to.

    carpool trace -o reference.safetensors
    carpool trace --text french.jsonl ... -o six-domains.safetensors
    python benchmarks/placement.py --trace reference.safetensors six-domains.safetensors \\
        --output docs/results/placement.json

Counts on traces, no times. Placements come from the first half of a trace and are scored on the second. Controls:
`shuffled` has the rows of every layer in another order, so that loads and what tokens choose together stay and what
follows what is lost; `independent` draws every choice from the loads alone, so that what tokens choose together is
lost, too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from carpool.artefacts.files import sha256_file, write_text
from carpool.artefacts.trace import Trace
from carpool.evaluate.results import provenance
from carpool.placement.baselines import linear
from carpool.placement.compare import compare
from carpool.placement.demand import chosen_TE, loads_LE, transitions_JEE
from carpool.placement.eplb import eplb
from carpool.placement.exflow import exflow
from carpool.placement.exflow_exact import exflow_exact
from carpool.placement.llep import least_loaded
from carpool.placement.metro import activated_XD, fewest_activated, least_peak
from carpool.placement.planners import Sizes
from carpool.placement.score import places, score
from carpool.placement.sharing import share

DEVICES, NODES = 8, 2
REDUNDANT = (8, 16, 32)  # replicas beyond one of each of 64 experts: 1.125, 1.25, 1.5
SHARES = ("xshare_expert_parallel(0.25)", "xshare_expert_parallel(0.5)", "xshare_expert_parallel(0.25, warmup=0)")
SKEWS = ((0.3, 16), (0.5, 16), (0.8, 16), (0.8, 4), (0.8, 1), (0.95, 1))  # share of the tokens, into so many experts
OPTIMA = 64  # steps a layer whose optimum is computed
SECONDS = 30.0


def shuffled(trace: Trace, generator: torch.Generator) -> Trace:
    """Every layer's rows in another order."""
    order = [torch.randperm(len(trace), generator=generator) for _ in range(trace.num_layers)]
    return _reordered(trace, order)


def independent(trace: Trace, generator: torch.Generator) -> Trace:
    """Every row's experts drawn without replacement, each as likely as it is chosen in the trace."""
    load_LE = loads_LE(trace).double().clamp_min(1e-9)
    drawn = [
        torch.multinomial(load_E.expand(len(trace), -1), trace.top_k, generator=generator).to(trace.experts_TLK.dtype)
        for load_E in load_LE
    ]
    return replace(trace, experts_TLK=torch.stack(drawn, 1))


def _reordered(trace: Trace, order: list[torch.Tensor]) -> Trace:
    experts = torch.stack([trace.experts_TLK[one, layer] for layer, one in enumerate(order)], 1)
    assert trace.weights_TLK is not None
    weights = torch.stack([trace.weights_TLK[one, layer] for layer, one in enumerate(order)], 1)
    return replace(trace, experts_TLK=experts, weights_TLK=weights)


def table(trace: Trace) -> list[dict[str, Any]]:
    """Every planner: scores on the window that it was planned on, and on the next."""
    rows = compare(trace, Sizes(DEVICES, NODES), "deepep")
    return [
        {"planner": row.planner.name, "objective": row.planner.objective, "own": asdict(row.own),
         "later": asdict(row.later), "moved": row.moved, "value": row.placement.value, "bound": row.placement.bound,
         "status": row.placement.status, "slots": row.placement.slots}
        for row in rows
    ]  # fmt: skip


def exflow_claims(trace: Trace) -> list[dict[str, Any]]:
    """Hops of the best expert's path, on the next window."""
    now, later = trace.windows(2)
    moves_JEE = transitions_JEE(now, best_only=True)
    found = []
    for devices in (2, 4, 8):
        placement, start = exflow(moves_JEE, devices), linear(trace.num_layers, trace.num_experts, devices)
        found.append({
            "devices": devices, "linear": score(start, later).hops, "exflow": score(placement, later).hops,
            "exflow_on_its_own_window": score(placement, now).hops, "random_expectation": 1 - 1 / devices,
        })  # fmt: skip
    return found


def certificates() -> list[dict[str, Any]]:
    """Descent beside HiGHS where that ends: made-up transitions of few experts."""
    found = []
    for layers, experts, devices in ((4, 8, 2), (6, 8, 2), (4, 8, 4)):
        generator = torch.Generator().manual_seed(layers * experts * devices)
        moves_JEE = torch.randint(0, 100, (layers - 1, experts, experts), generator=generator)
        exact = exflow_exact(moves_JEE, devices, seconds=SECONDS)
        descent = exflow(moves_JEE, devices)
        found.append({"layers": layers, "experts": experts, "devices": devices, "descent": descent.value,
                      "best": exact.value, "bound": exact.bound, "status": exact.status})  # fmt: skip
    return found


def metro_claims(trace: Trace) -> list[dict[str, Any]]:
    """Experts that the busiest device reads, by how replicas are chosen."""
    now, later = trace.windows(2)
    step_T, _ = places(later)
    found = []
    for redundant in (0, *REDUNDANT):
        placement = eplb(loads_LE(now), DEVICES, NODES, redundant=redundant)
        peaks: dict[str, list[float]] = {"order": [], "fewest": [], "optimum": [], "fewest_there": []}
        for layer in range(trace.num_layers):
            holds_DE = placement.holds_LDE[layer]
            active_XE = torch.zeros(int(step_T[-1]) + 1, trace.num_experts, dtype=torch.int64)
            active_XE.index_add_(0, step_T, chosen_TE(later, layer).long())
            for name, first in (("order", False), ("fewest", True)):
                device_XE = fewest_activated(active_XE > 0, holds_DE, fewest_first=first)
                peaks[name].append(float(activated_XD(device_XE, DEVICES).amax(-1).double().mean()))
            some_XE = active_XE[:OPTIMA] > 0
            peaks["optimum"].append(sum(least_peak(active_E, holds_DE) for active_E in some_XE) / len(some_XE))
            there = activated_XD(fewest_activated(some_XE, holds_DE), DEVICES).amax(-1)
            peaks["fewest_there"].append(float(there.double().mean()))
        means = {name: sum(values) / len(values) for name, values in peaks.items()}
        found.append({"redundant": redundant, "hash": score(placement, later, "hash").peak_activated, **means})
    return found


def sharing_claims(trace: Trace) -> list[dict[str, Any]]:
    """Peak experts of a device under XShare's caps, on experts in order and on EPLB's placement."""
    now, later = trace.windows(2)
    placements = {"linear": linear(trace.num_layers, trace.num_experts, DEVICES, NODES),
             "eplb": eplb(loads_LE(now), DEVICES, NODES),
             "eplb + replicas, metro": eplb(loads_LE(now), DEVICES, NODES, redundant=REDUNDANT[0])}  # fmt: skip
    return [
        {"plan": name, "policy": policy, **asdict(share(placement, later, policy))}
        for name, placement in placements.items()
        for policy in SHARES
    ]


def llep_claims(trace: Trace, tokens: int = 32_768, experts: int = 128, top_k: int = 4) -> dict[str, Any]:
    """Peak tokens and memory of a device with and without moving, under the paper's skews and on a trace's prompts."""
    home_E = torch.arange(experts) * DEVICES // experts
    skewed = []
    for share_, into in SKEWS:
        pairs = tokens * DEVICES * top_k
        load_E = torch.full((experts,), pairs * (1 - share_) / (experts - into)).long()
        load_E[:into] = int(pairs * share_ / into)
        skewed.append({"share": share_, "experts": into, **_spilled(load_E, home_E, 2 * 2880 * 2, 3 * 2880 * 2880 * 2)})
    prompts = trace.of_phase("prefill")
    own_E = torch.arange(trace.num_experts) * DEVICES // trace.num_experts
    facts = trace.facts
    natural = []
    for rows in prompts.steps():
        part = prompts.select(rows)
        for load_E in loads_LE(part):
            natural.append(_spilled(load_E, own_E, facts.hidden_size * 4, facts.expert_bytes, least=1))
    mean = {name: sum(one[name] for one in natural) / len(natural) for name in natural[0]}
    return {"skewed": skewed, "prompts": mean, "tokens_a_device": tokens}


def _spilled(
    load_E: torch.Tensor, home_E: torch.Tensor, token: int, expert: int, least: int = 1024
) -> dict[str, float]:
    """Against the load of every device and its memory: a token's input and output in 16 bits, and foreign experts."""
    plain = least_loaded(load_E, home_E, DEVICES, ratio=float("inf"))
    moved = least_loaded(load_E, home_E, DEVICES, least=least)
    return {
        "peak_over_mean": float(plain.loads_D.max()) / float(plain.loads_D.double().mean()),
        "peak_over_mean_moved": float(moved.loads_D.max()) / float(moved.loads_D.double().mean()),
        "memory_ratio": plain.peak_bytes(token, expert) / moved.peak_bytes(token, expert),
        "moved_experts": float(len(moved.moves_X2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    traces: dict[str, Any] = {}
    for path in options.trace:
        whole = Trace.load(path)
        decode = whole.of_phase("decode")
        generator = torch.Generator().manual_seed(0)
        kinds = {"recorded": decode, "shuffled": shuffled(decode, generator),
                 "independent": independent(decode, generator)}  # fmt: skip
        found: dict[str, Any] = {
            "sha256": sha256_file(path), "facts": {**whole.facts.as_json(), "domains": sorted({*whole.facts.domains})},
            "tokens": len(whole), "steps": len(list(decode.steps())), "top_k": whole.top_k,
        }  # fmt: skip
        for name, trace in track(list(kinds.items()), path.stem):
            found[name] = {"planners": table(trace), "exflow": exflow_claims(trace)}
        found["metro"] = metro_claims(decode)
        found["sharing"] = sharing_claims(decode)
        found["llep"] = llep_claims(whole)
        traces[path.stem] = found
    about = {**provenance(), "devices": DEVICES, "nodes": NODES, "certificates": certificates()}
    write_text(options.output, json.dumps({**about, "traces": traces}, indent=1) + "\n")


if __name__ == "__main__":
    main()
