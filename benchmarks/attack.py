"""How far can a stranger push a victim's tokens? Two searches against every policy and floor.

    python benchmarks/attack.py --output docs/results/attack.json

A victim decodes one token in a batch with attackers who choose all of their text (and, as with a server that lets
clients force tokens, their last token too). Both searches are coordinate ascent: one attacker after the other takes the
best of many candidates.

Routing: attackers are rows whose router logits were recorded; maximises the victim's displaced mass in one layer.
Tokens: attackers are sequences run through the model; maximises KL(stock || policy) of the victim's next token.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import Pool, Reference, groups_of, last_step
from rich.progress import track
from torch import Tensor

from carpool import Batch, Outcome, parse
from carpool.evaluate.lockstep import compare, forward
from carpool.files import write_text

POLICIES = (
    "xshare(budget=16)", "xshare(budget=16, warmup=0)", "des_vote(size=16)", "oea(k0=2)", "lynx(budget=16)",
    "base(budget=16)", "sere(top=2)",
)  # fmt: skip
FLOORS = (None, 0.3, 0.1)


@dataclass(frozen=True)
class Search:
    """How hard an attacker tries."""

    attackers: int
    candidates: int
    rounds: int
    seed: int


def routing_search(reference: Reference, pool: Pool, text: str, victims_V: Tensor, how: Search) -> dict[str, float]:
    """The largest displaced mass of any victim in any layer, beside random co-batches and after the search."""
    generator, attackers, candidates = torch.Generator().manual_seed(how.seed), how.attackers, how.candidates
    prepared, size, count = reference.prepared(text), attackers + 1, len(victims_V)
    batch = groups_of(count * candidates, size)
    worst, chance = 0.0, list[Tensor]()
    for layer in range(len(prepared)):
        chosen_VB = torch.randint(pool.rows, (count, size), generator=generator)
        chosen_VB[:, 0] = victims_V
        for turn in range(how.rounds * attackers):
            tried_VCB = chosen_VB.unsqueeze(1).repeat(1, candidates, 1)
            fresh = torch.randint(pool.rows, (count, candidates), generator=generator)
            if turn == 0:  # whole random co-batches, to start from the best and to know what chance does
                others = torch.randint(pool.rows, (count, candidates, attackers), generator=generator)
                tried_VCB[:, :, 1:] = others
            else:
                tried_VCB[:, 1:, 1 + turn % attackers] = fresh[:, 1:]  # the first candidate changes nothing
            outcome = reference.route(prepared, pool, layer, tried_VCB.flatten(), batch)
            displaced_VC = outcome.displaced_N.view(count, candidates, size)[:, :, 0]
            if turn == 0:
                chance.append(displaced_VC.flatten())
            chosen_VB = tried_VCB[torch.arange(count), displaced_VC.argmax(1)]
            worst = max(worst, float(displaced_VC.max()))
    random = torch.cat(chance)
    return {
        "displaced_random_mean": float(random.mean()), "displaced_random_max": float(random.max()),
        "displaced_worst": worst,
    }  # fmt: skip


def candidates_for(windows_WT: Tensor, vocabulary: int, count: int, generator: torch.Generator) -> Tensor:
    """Texts of an attacker: windows of text, a quarter of them with another last token, a quarter a repeated token."""
    ids_CT = windows_WT[torch.randint(len(windows_WT), (count,), generator=generator)].clone()
    tokens = torch.randint(2, vocabulary, (count,), generator=generator)
    ids_CT[: count // 2, -1] = tokens[: count // 2]
    ids_CT[: count // 4] = tokens[: count // 4].unsqueeze(1)
    return ids_CT


def token_search(
    reference: Reference, windows_WT: Tensor, text: str, victim_T: Tensor, target: int, how: Search
) -> dict[str, float]:
    """The largest loss of one victim, beside random co-batches and after the search."""
    generator, attackers, candidates = torch.Generator().manual_seed(how.seed), how.attackers, how.candidates
    layout, plan = last_step(attackers + 1, len(victim_T)), parse(text)
    vocabulary = reference.model.config.vocab_size
    displaced = torch.zeros(candidates)

    def observe(layer: int, batch: Batch, outcome: Outcome) -> None:
        own = outcome.displaced_N.view(-1, layout.rows, layout.positions)[:, 0, -1]
        displaced[: len(own)] = torch.maximum(displaced[: len(own)], own.float())

    def run(ids_CBT: Tensor, under: Any) -> Tensor:
        one = forward(
            reference.model, under, ids_CBT.flatten(0, 1), layout, num_layers=reference.moe.layers,
            stats=reference.stats, observe=observe,
        )  # fmt: skip
        return one.logits_RV.view(len(ids_CBT), layout.rows, -1)[:, 0]

    chosen_BT = torch.cat((victim_T.unsqueeze(0), candidates_for(windows_WT, vocabulary, attackers, generator)))
    stock_V = run(chosen_BT.unsqueeze(0), reference.moe.stock)
    found: dict[str, float] = {}
    worst_displaced = 0.0
    for turn in range(how.rounds * attackers):
        tried_CBT = chosen_BT.unsqueeze(0).repeat(candidates, 1, 1)
        if turn == 0:
            fresh = candidates_for(windows_WT, vocabulary, candidates * attackers, generator)
            fresh = fresh[torch.randperm(len(fresh), generator=generator)]
            tried_CBT[:, 1:] = fresh.view(candidates, attackers, -1)
        else:
            tried_CBT[1:, 1 + turn % attackers] = candidates_for(windows_WT, vocabulary, candidates - 1, generator)
        displaced.zero_()
        logits_CV = run(tried_CBT, plan)
        against = compare(stock_V.expand_as(logits_CV), logits_CV, torch.full((candidates,), target))
        worst_displaced = max(worst_displaced, float(displaced.max()))
        best = int(against.kl_R.argmax())
        if turn == 0:
            found = {"kl_random_mean": float(against.kl_R.mean()), "kl_random_max": float(against.kl_R.max())}
        found |= {"kl_worst": float(against.kl_R[best]), "flipped": 1 - float(against.agree_R[best])}
        stock_nll = -float(stock_V.log_softmax(-1)[0, target])
        found["nll_increase"] = float(against.nll_R[best]) - stock_nll
        chosen_BT = tried_CBT[best]
    return found | {"token_displaced_worst": worst_displaced}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--attackers", type=int, default=7)
    parser.add_argument("--victims", type=int, default=2, help="of the search over tokens")
    parser.add_argument("--candidates", type=int, default=24, help="of the search over tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    reference = Reference()
    drawn = reference.sequences(64 + given.victims, given.length, given.seed)
    victims, windows = drawn.ids_ST[: given.victims], drawn.ids_ST[given.victims :, :-1]
    pool = reference.record(windows)
    rows_V = torch.randint(pool.rows, (16,), generator=torch.Generator().manual_seed(given.seed))
    results = []
    for policy, tau in track([(policy, tau) for policy in POLICIES for tau in FLOORS], "attacking"):
        text = policy if tau is None else f"{policy} | floor({tau})"
        routed = routing_search(reference, pool, text, rows_V, Search(given.attackers, 32, 3, given.seed))
        runs = []
        for i, ids in enumerate(victims):
            how = Search(given.attackers, given.candidates, given.rounds, given.seed + i)
            runs.append(token_search(reference, windows, text, ids[:-1], int(ids[-1]), how))
        tokens = {name: max(run[name] for run in runs) for name in runs[0]}
        tokens["kl_random_mean"] = sum(run["kl_random_mean"] for run in runs) / len(runs)
        worst = max(routed["displaced_worst"], tokens["token_displaced_worst"])
        bound = 1.0 if tau is None else tau
        head = {"policy": policy, "floor": tau, "bound": bound, "held": worst <= bound + 1e-5}
        results.append(head | routed | tokens)
    facts = reference.facts(**{name: value for name, value in vars(given).items() if name != "output"})
    content = {"kind": "carpool attack", **facts, "routing": {"victims": 16, "candidates": 32, "rounds": 3}}
    write_text(given.output, json.dumps(content | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
