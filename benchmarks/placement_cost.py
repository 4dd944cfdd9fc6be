"""Does `max(a + b experts, c + d pairs)` describe what a rank computes? Fitted on this project's module on CPU ranks.

    python benchmarks/placement_cost.py --output docs/results/placement-cost.json

Two gloo ranks of a thread each run `PlacedExperts` on float32 experts of Qwen3-30B-A3B's size, 32 on each rank, which
together do not fit into caches. Only the part that computes experts is timed, in time of its thread, not what is
exchanged. Every step lets tokens choose among some of the experts; its repetitions have the same counts on other
experts, and the fastest counts. Half of the steps is fitted, the other half is predicted. The numbers are of these CPUs
and stand for no GPU and no wire.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from engines import machine

from carpool.artefacts.files import write_text
from carpool.evaluate.results import provenance
from carpool.placement.baselines import linear
from carpool.placement.cost import CostModel, fit
from carpool.placement.execute import layer as placed
from carpool.placement.execute.weights import Weights

RANKS, EACH, HIDDEN, WIDTH, TOP_K = 2, 32, 2048, 768, 2
ALLOWED = (1, 2, 4, 8, 16, 32)  # experts of a rank that a step's tokens choose among
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens of a rank
REPEATS = 7


def steps(seed: int) -> list[Tensor]:
    """Choices of every step, int64 `[ranks * rows, K]` each, in random order."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for allowed in ALLOWED:
        for rows in ROWS:
            some_A = torch.cat(
                [rank * EACH + torch.randperm(EACH, generator=generator)[:allowed] for rank in range(RANKS)]
            )
            likely_NA = torch.ones(RANKS * rows, len(some_A))
            made.append(some_A[torch.multinomial(likely_NA, TOP_K, generator=generator)])
    return [made[at] for at in torch.randperm(len(made), generator=generator).tolist()]


def moved(ids_NK: Tensor, by: int) -> Tensor:
    """The same choices of other experts of the same ranks."""
    return ids_NK // EACH * EACH + (ids_NK + by) % EACH


@torch.inference_mode()
def on_rank(rank: int, folder: str, seed: int) -> None:
    """Saves `[steps, 3]`: experts, pairs, least microseconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    one = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(1, 2 * WIDTH, HIDDEN, generator=one).expand(RANKS * EACH, -1, -1) / HIDDEN**0.5
    down = torch.randn(1, HIDDEN, WIDTH, generator=one).expand(RANKS * EACH, -1, -1) / WIDTH**0.5
    experts = placed.PlacedExperts(Weights(gate_up, down), linear(1, RANKS * EACH, RANKS))
    compute, spent = placed.mixed, list[float]()

    def timed(*given: Any) -> Tensor:
        dist.barrier()
        began = time.thread_time()
        result = compute(*given)
        spent.append((time.thread_time() - began) * 1e6)
        return result

    placed.mixed = timed
    found = []
    for number, ids_NK in enumerate(steps(seed)):
        rows = len(ids_NK) // RANKS
        hidden_NH = torch.randn(rows, HIDDEN, generator=one)
        spent.clear()
        for repeat in range(REPEATS + 1):  # the first warms up
            mine_NK = moved(ids_NK, number + 5 * repeat)[rank * rows : (rank + 1) * rows]
            experts(hidden_NH, mine_NK, torch.full((rows, TOP_K), 1 / TOP_K))
        computed_E = experts.computed_E
        found.append([float((computed_E > 0).sum()), float(computed_E.sum()), min(spent[1:])])
    torch.save(torch.tensor(found, dtype=torch.float64), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def errors(predicted_R: Tensor, micros_R: Tensor) -> dict[str, float]:
    """Of predictions: relative ones, and what share of the spread is left."""
    off_R = (predicted_R - micros_R).abs() / micros_R
    left = ((predicted_R - micros_R) ** 2).sum() / ((micros_R - micros_R.mean()) ** 2).sum()
    return {"median": float(off_R.median()), "most": float(off_R.max()), "r2": 1 - float(left)}


def least_squares(columns: list[Tensor], micros_R: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """A sum with a constant, as a predictor."""
    with_one = torch.stack([torch.ones_like(micros_R), *columns], 1)
    weights = torch.linalg.lstsq(with_one, micros_R.unsqueeze(1)).solution.flatten()
    return lambda columns: torch.stack([torch.ones_like(columns[0]), *columns], 1) @ weights


def compared(known_R3: Tensor, new_R3: Tensor) -> tuple[CostModel, dict[str, Any]]:
    """The model of the known measurements, and errors of it and of simpler ones on the new."""
    experts_R, pairs_R, micros_R = known_R3.T
    model = fit(experts_R, pairs_R, micros_R)
    (new_experts_R, new_pairs_R, new_micros_R) = new_R3.T
    by_experts_R = model.a + model.b * new_experts_R >= model.c + model.d * new_pairs_R
    predicted_R = model.devices(new_experts_R, new_pairs_R)
    forms = {"experts alone": [0], "pairs alone": [1], "sum of both": [0, 1]}
    simpler = {
        name: errors(
            least_squares([known_R3[:, at] for at in which], micros_R)([new_R3[:, at] for at in which]), new_micros_R
        )
        for name, which in forms.items()
    }
    sides = {
        name: errors(predicted_R[side_R], new_micros_R[side_R]) | {"measurements": int(side_R.sum())}
        for name, side_R in (("experts", by_experts_R), ("pairs", ~by_experts_R))
        if side_R.any()
    }
    return model, {"max": errors(predicted_R, new_micros_R), **simpler, "max, where it goes by": sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (folder, given.seed), nprocs=RANKS)
        measured_DS3 = torch.stack([torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)])
    known_R3, new_R3 = measured_DS3[:, ::2].flatten(0, 1), measured_DS3[:, 1::2].flatten(0, 1)
    model, found = compared(known_R3, new_R3)
    about = {
        **provenance(), "machine": machine(), "ranks": RANKS, "experts_of_a_rank": EACH, "hidden_size": HIDDEN,
        "width": WIDTH, "dtype": "float32", "expert_bytes": 3 * HIDDEN * WIDTH * 4, "repeats": REPEATS,
        "seed": given.seed,
    }  # fmt: skip
    measured = {"known": known_R3.tolist(), "new": new_R3.tolist()}
    content = {**about, "model": asdict(model), "errors": found, "experts_pairs_micros": measured}
    write_text(given.output, json.dumps(content, indent=1) + "\n")
    print(json.dumps({"model": asdict(model), "errors": found}, indent=1))


if __name__ == "__main__":
    main()
