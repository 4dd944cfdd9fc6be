"""Do experts share a centre? ResMoE's barycentre and a plain mean under low-rank rests, against no centre at all.

    python benchmarks/expert_centres.py --text heldout/*.jsonl -o docs/results/expert-centres.json

An expert is a cloud of hidden units, each a row of its gate, up and down projection; units may be permuted. ResMoE (KDD
2025) takes the Wasserstein barycentre of the clouds as the centre: with as many units of equal mass everywhere that is
the mean of the experts after each is permuted to fit it, found by turns (an assignment problem, which scipy solves
exactly). What is left of an expert is cut to a rank (singular value decomposition). Shared bases with low-rank rests
(arXiv 2510.02345) have a mean for each of a few groups of similar experts; without training their structure alone is
tried. All at equal size: what centres take is spread over the layer's experts, and comes off the rank. KL is of the
next token, the whole text through the changed model.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from carpool.artefacts.files import write_text
from carpool.artefacts.texts import load_texts
from carpool.calibrate import token_sequences
from carpool.calibrate.pruning import errors
from carpool.cli.common import load, model_facts
from carpool.evaluate.results import provenance, text_facts
from carpool.hosts.transformers import find_layers

RANKS = (8, 16, 24, 32)
GROUPS = 4
HOW = ("none", "mean", "barycentre", "groups")
TURNS = 10
TOKENS, WINDOW = 8_192, 64


def clouds(layer: Any) -> Tensor:
    """The experts of a layer as hidden units, `[E, I, 3 H]`."""
    held = layer.experts
    gate_EIH, up_EIH = held.gate_up_proj.detach().float().chunk(2, 1)
    return torch.cat([gate_EIH, up_EIH, held.down_proj.detach().float().mT], -1)


def write_back(layer: Any, units_EIX: Tensor) -> None:
    """The inverse of `clouds`, in place."""
    gate_EIH, up_EIH, down_EIH = units_EIX.chunk(3, -1)
    with torch.no_grad():
        layer.experts.gate_up_proj.copy_(torch.cat([gate_EIH, up_EIH], 1))
        layer.experts.down_proj.copy_(down_EIH.mT)


def aligned(units_EIX: Tensor) -> Tensor:
    """The experts with their units permuted to fit their barycentre, from the first expert on."""
    centre_IX = units_EIX[0]
    for _ in range(TURNS):
        cost_EII = torch.cdist(centre_IX.expand_as(units_EIX), units_EIX).square()
        order_EI = torch.stack([torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) for cost in cost_EII])
        fitted_EIX = units_EIX.gather(1, order_EI.unsqueeze(-1).expand_as(units_EIX))
        centre_IX = fitted_EIX.mean(0)
    return fitted_EIX


def cut(units_EIX: Tensor, rank: int) -> Tensor:
    """Every matrix at its best approximation of a rank."""
    left, values, right = torch.linalg.svd(units_EIX, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def centres(units_EIX: Tensor, count: int) -> Tensor:
    """The mean of every expert's group, groups by Ward's criterion on the weights."""
    group_E = torch.from_numpy(fcluster(linkage(units_EIX.flatten(1).numpy(), "ward"), count, "maxclust")) - 1
    member_GE = torch.nn.functional.one_hot(group_E.long(), count).T.float()
    mean_GIX = torch.einsum("ge,eix->gix", member_GE, units_EIX) / member_GE.sum(1).clamp_min(1)[:, None, None]
    return mean_GIX[group_E.long()]


def restored(units_EIX: Tensor, how: str, rank: int) -> tuple[Tensor, Tensor]:
    """What the experts are restored to, beside what they are (permuted where `how` permutes them)."""
    units_EIX = aligned(units_EIX) if how == "barycentre" else units_EIX
    E, I, X = units_EIX.shape  # noqa: E741
    count = {"none": 0, "groups": GROUPS}.get(how, 1)
    centre_EIX = centres(units_EIX, count) if count else torch.zeros_like(units_EIX)
    return centre_EIX + cut(units_EIX - centre_EIX, rank + spared(1 - count, E, I, X)), units_EIX


def spared(centres: int, experts: int, inner: int, width: int) -> int:
    """Rank that an expert can have for what so many centres take."""
    return round(centres * inner * width / experts / (inner + width))


def measured(model: Any, windows_BT: Tensor, how: str, rank: int) -> dict[str, Any]:
    """A row: bytes stored over 16 bits (factors and centre in 16 bits), energy of the weights that is lost, KL."""
    made = copy.deepcopy(model)
    lost, whole = 0.0, 0.0
    for layer in find_layers(made):
        found_EIX, units_EIX = restored(clouds(layer), how, rank)
        lost += float((found_EIX - units_EIX).square().sum())
        whole += float(units_EIX.square().sum())
        write_back(layer, found_EIX)
    E, I, X = units_EIX.shape  # noqa: E741
    size = rank * (I + X) / (I * X) + 1 / E  # the same for all
    return {"centre": how, "rank": rank, "bytes": size, "lost": lost / whole, **errors(model, made, windows_BT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer, _ = load(None, None)
    windows_BT = token_sequences(load_texts(options.text), tokenizer, TOKENS, WINDOW, 0).ids_BT
    found = [measured(model, windows_BT, how, rank) for rank in RANKS for how in HOW]
    content = {
        **provenance(), "model": model_facts(model, None), "texts": text_facts(options.text),
        "arguments": {"tokens": TOKENS, "window": WINDOW, "turns": TURNS, "groups": GROUPS, "seed": 0}, "rows": found,
    }  # fmt: skip
    write_text(options.output, json.dumps(content, indent=1) + "\n")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
