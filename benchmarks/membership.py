"""Can an attacker tell from log-probabilities of their own what runs beside them?

    python benchmarks/membership.py --output docs/results/membership.json

An attacker decodes the same sequence again and again (tokens forced) while victims decode text of domain A or B beside
it, and reads their own log-probabilities. Two questions, both answered by ridge regression, cross-validated over steps
of other victims, as an area under the ROC curve (0.5 is chance, 1 is certainty):

    domain    is a victim's text of domain A or of B? From the attacker's log-probabilities at all decoded positions.
    experts   does a victim natively use an expert of a layer in this step? From the log-probabilities of the step,
              mean over the experts that 20 to 80 % of the victims use, and over layers and some positions. The mean of
              the best tenth is given too: an attacker asks about the experts that leak.

With more than two rows a batch, all victims are of one domain for the first question (the easiest case that is left),
and the second is about the first victim, among strangers. Differences in the last bits, which the kernels of stock show
too, are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Reference
from rich.progress import track
from torch import Tensor

from carpool import Batch, Outcome, parse
from carpool.artefacts.files import write_text
from carpool.evaluate.layout import Layout
from carpool.evaluate.lockstep import forward
from carpool.routing.batch import Grouping

Array = np.ndarray[Any, Any]
RUNS = (  # policy, grouping, rows of a batch
    ("stock", "batch", 2), ("xshare(budget=8)", "batch", 2), ("xshare(budget=8) | floor(0.3)", "batch", 2),
    ("xshare(budget=8) | floor(0.1)", "batch", 2), ("oea(k0=2)", "batch", 2), ("sere(top=2)", "batch", 2),
    ("topk(k=4)", "batch", 2), ("xshare(budget=8)", "request", 2),
    ("xshare(budget=16)", "batch", 8), ("xshare(budget=16) | floor(0.3)", "batch", 8),
)  # fmt: skip
WORDS = 20  # log-probabilities a step, as vLLM returns at most by default
FOLDS = 5


def auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve; ties count half."""
    first, second = scores[labels], scores[~labels]
    above = (first[:, None] > second).mean() + (first[:, None] == second).mean() / 2
    return float(above)


def predicted(features_BF: Array, labels_BX: Array, seed: int) -> Array:
    """Cross-validated scores `[B, X]` of ridge regressions onto labels, the strength fixed at a tenth of the rows'
    mean square."""
    order = np.random.default_rng(seed).permutation(len(features_BF))
    scores_BX = np.zeros(labels_BX.shape)
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        mean, scale = features_BF[rest].mean(0), features_BF[rest].std(0)
        scaled = (features_BF - mean) / np.maximum(scale, 1e-12)
        scaled[:, scale < 1e-5] = 0  # what does not move is rounding
        given, wanted = scaled[rest], labels_BX[rest] - labels_BX[rest].mean(0)
        kernel = given @ given.T
        strength = 0.1 * max(float(np.trace(kernel)) / len(rest), 1e-9)
        scores_BX[fold] = scaled[fold] @ given.T @ np.linalg.solve(kernel + strength * np.eye(len(rest)), wanted)
    return scores_BX


def observe_run(
    reference: Reference, text: str, group: str, ids_SBT: Tensor, prefill: int, words_DW: Tensor
) -> tuple[Array, Array]:
    """The attacker's log-probabilities `[S, D, W]`, and the first victim's native experts `[L, S, D, E]`."""
    layout = Layout(ids_SBT.shape[1], ids_SBT.shape[2], prefill, Grouping.parse(group))
    native: list[Tensor] = []

    def see(layer: int, batch: Batch, outcome: Outcome) -> None:
        shaped = outcome.inputs.native_NE.view(-1, layout.batch_size, layout.positions, outcome.inputs.num_experts)
        native.append(shaped[:, 1, prefill:])

    plan = reference.moe.stock if text == "stock" else parse(text)
    one = forward(
        reference.model, plan, ids_SBT.flatten(0, 1), layout, num_layers=reference.moe.layers, stats=reference.stats,
        observe=see,
    )  # fmt: skip
    own_SDV = one.logits_RV.view(len(ids_SBT), layout.batch_size, layout.decoded, -1)[:, 0].log_softmax(-1)
    seen_SDW = own_SDV.gather(-1, words_DW.expand(len(ids_SBT), -1, -1))
    return seen_SDW.double().numpy(), torch.stack(native).numpy()


def answer(reference: Reference, text: str, group: str, rows: int, given: argparse.Namespace) -> dict[str, Any]:
    """Both areas for one run."""
    count, length = given.steps // 2, given.prefill + given.decoded
    attacker_T = reference.sequences(1, length, given.seed + 1).ids_ST[0, :-1]
    drawn = [reference.sequences(count * (rows - 1), length, given.seed, name).ids_ST for name in given.domains]
    victims_SXT = torch.cat([ids[:, :-1].view(count, rows - 1, length) for ids in drawn])
    ids_SBT = torch.cat((attacker_T.expand(len(victims_SXT), 1, length), victims_SXT), 1)
    with torch.inference_mode():
        alone_DV = reference.model(input_ids=attacker_T[None], logits_to_keep=given.decoded).logits[0]
    words_DW = alone_DV.topk(WORDS).indices
    seen, native = [], []
    for part in ids_SBT.split(max(1, 2048 // (rows * length))):
        one = observe_run(reference, text, group, part, given.prefill, words_DW)
        seen.append(one[0])
        native.append(one[1])
    seen_SDW, native_LSDE = np.concatenate(seen), np.concatenate(native, 1)
    of_first = np.arange(len(seen_SDW)) < count
    domain_S1 = predicted(seen_SDW.reshape(len(seen_SDW), -1), of_first[:, None].astype(float), given.seed)
    areas = []
    for position in range(0, given.decoded, max(1, given.decoded // 6)):
        labels_SX = native_LSDE[:, :, position].transpose(1, 0, 2).reshape(len(seen_SDW), -1)
        usual = (labels_SX.mean(0) > 0.2) & (labels_SX.mean(0) < 0.8)
        scores_SX = predicted(seen_SDW[:, position], labels_SX[:, usual].astype(float), given.seed)
        areas += [auc(s, label) for s, label in zip(scores_SX.T, labels_SX[:, usual].T, strict=True)]
    best = sorted(areas)[-max(1, len(areas) // 10) :]
    return {
        "policy": text, "group": group, "batch": rows, "steps": len(seen_SDW),
        "spread": float(seen_SDW.std(0).mean()), "domain_auc": auc(domain_S1[:, 0], of_first),
        "experts_auc": float(np.mean(areas)), "experts_auc_best_tenth": float(np.mean(best)), "experts": len(areas),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120, help="batches, half of them beside each domain")
    parser.add_argument("--prefill", type=int, default=8)
    parser.add_argument("--decoded", type=int, default=12)
    parser.add_argument("--domains", nargs=2, default=["python", "prose"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    reference = Reference()
    results = [answer(reference, *run, given) for run in track(RUNS, "listening")]
    facts = reference.facts(**{name: value for name, value in vars(given).items() if name != "output"})
    content = {"kind": "carpool membership", **facts, "words": WORDS, "folds": FOLDS, "results": results}
    write_text(given.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
