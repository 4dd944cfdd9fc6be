"""What co-batched strangers do to the saving, and to everybody's share of the coreset.

    python benchmarks/inflation.py --output docs/results/inflation.json

Steps of `--batch` rows are replayed through the routers of every layer; the first rows are users', the rest attackers'.
Rows are router logits recorded from the reference model under native routing. Attackers, from harmless to hostile:

    benign     rows of other texts
    repeated   all attackers send the same row, taken from a prompt of one repeated token
    inflating  coordinate ascent over recorded rows for the largest union, summed over layers
    starving   coordinate ascent for the largest displaced mass of the users

Ties: how often the last expert that a budget takes and the first that it leaves have the same utility to the last bit,
so that only the tie rule decides; and how often the order of the rows changes anything (it must not).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from reference import Pool, Reference, groups_of
from rich.progress import track
from torch import Tensor

from carpool.artefacts.files import write_text
from carpool.plans.grammar import Plan

POLICIES = (
    "xshare(budget=16)", "xshare(budget=16) | floor(0.3)", "des_vote(size=16)", "oea(k0=2)", "lynx(budget=16)",
    "base(budget=16)", "sere(top=2)", "sere(top=2) | floor(0.3)",
)  # fmt: skip
ATTACKS = ("benign", "repeated", "inflating", "starving")
FIELDS = ("natural", "union", "excess", "displaced", "overflow")
Prepared = list[tuple[Plan, Any]]


def measure(reference: Reference, prepared: Prepared, pool: Pool, rows_CB: Tensor, users: int) -> dict[str, Tensor]:
    """Sums over layers of what every one of `C` steps reads, and the users' displaced mass; `excess`: the most that a
    layer reads beyond the natural union."""
    count, size = rows_CB.shape
    batch = groups_of(count, size)
    parts = []
    for layer in range(len(prepared)):
        outcome = reference.route(prepared, pool, layer, rows_CB.flatten(), batch)
        natural_C, union_C = outcome.natural_SE.sum(-1), outcome.union_SE.sum(-1)
        displaced_C = outcome.displaced_N.view(count, size)[:, :users].mean(1)
        parts.append((natural_C, union_C, union_C - natural_C, displaced_C, outcome.overflow_SE.sum(-1)))
    columns = [torch.stack(column) for column in zip(*parts, strict=True)]
    return {
        name: column.amax(0) if name == "excess" else column.double().mean(0)
        for name, column in zip(FIELDS, columns, strict=True)
    }


def ascend(
    reference: Reference, prepared: Prepared, pool: Pool, start_B: Tensor, users: int, field: str, candidates: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Rows `[B]` in which one attacker after the other took the best of many recorded rows."""
    chosen_B = start_B.clone()
    for place in range(users, len(chosen_B)):
        tried_CB = chosen_B.repeat(candidates, 1)
        tried_CB[1:, place] = torch.randint(pool.rows, (candidates - 1,), generator=generator)
        chosen_B = tried_CB[measure(reference, prepared, pool, tried_CB, users)[field].argmax()]
    return chosen_B


def boundary_ties(reference: Reference, text: str, pool: Pool, steps_CB: Tensor) -> dict[str, float]:
    """Share of (step, layer) pairs whose coreset changes if equal utilities are ranked the other way round, and
    whether anything changes with the order of the rows."""
    from carpool.routing import keys

    prepared, (count, size) = reference.prepared(text), steps_CB.shape
    batch, straight = groups_of(count, size), keys.tie_order
    by_tie = by_order = 0
    for layer in range(len(prepared)):
        before = reference.route(prepared, pool, layer, steps_CB.flatten(), batch).coreset_GE
        again = reference.route(prepared, pool, layer, steps_CB.flip(1).flatten(), batch).coreset_GE
        by_order += int((before != again).any(-1).sum())
        keys.tie_order = lambda *given: keys.MAX_EXPERTS - 1 - straight(*given)
        try:
            other = reference.route(prepared, pool, layer, steps_CB.flatten(), batch).coreset_GE
        finally:
            keys.tie_order = straight
        by_tie += int((before != other).any(-1).sum())
    pairs = count * len(prepared)
    return {"decided_by_ties": by_tie / pairs, "changed_by_order": by_order / pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps of users, each attacked anew")
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    reference, users = Reference(), given.batch - given.attackers
    generator = torch.Generator().manual_seed(given.seed)
    ids_ST = reference.sequences(64, 32, given.seed).ids_ST[:, :-1]
    tokens = torch.randint(2, reference.model.config.vocab_size, (16, 1), generator=generator)
    pool = reference.record(torch.cat((ids_ST, tokens.expand(16, ids_ST.shape[1]))), last=16)
    text_rows = len(ids_ST) * 16  # the rest are rows of repeated tokens
    benign_SB = torch.randint(text_rows, (given.steps, given.batch), generator=generator)
    repeated_S = torch.randint(text_rows, pool.rows, (given.steps,), generator=generator)
    results = []
    for text in track(POLICIES, "attacking"):
        prepared = reference.prepared(text + " | short_circuit")
        for attack in ATTACKS:
            steps_SB = benign_SB.clone()
            for step in range(given.steps):
                if attack == "repeated":
                    steps_SB[step, users:] = repeated_S[step]
                elif attack != "benign":
                    field = "union" if attack == "inflating" else "displaced"
                    steps_SB[step] = ascend(
                        reference, prepared, pool, benign_SB[step], users, field, given.candidates, generator
                    )
            found = measure(reference, prepared, pool, steps_SB, users)
            row = {name: float(found[name].double().mean()) for name in FIELDS if name != "excess"}
            results.append({"policy": text, "attack": attack, **row, "excess": int(found["excess"].max())})
    repeated_SB = benign_SB.clone()
    repeated_SB[:, users:] = repeated_S.unsqueeze(1)
    half = Pool(pool.logits_LNE.bfloat16().float(), pool.hidden_LNH)
    ties = [
        {"policy": text, "rows": name, "logits": kind, **boundary_ties(reference, text, source, steps_SB)}
        for text in ("xshare(budget=16)", "des_vote(size=16)", "lynx(budget=16)")
        for name, steps_SB in (("benign", benign_SB), ("repeated", repeated_SB))
        for kind, source in (("float32", pool), ("bfloat16", half))
    ]
    facts = reference.facts(**{name: value for name, value in vars(given).items() if name != "output"})
    content = {"kind": "carpool inflation", **facts, "experts": reference.moe.experts, "results": results, "ties": ties}
    write_text(given.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
