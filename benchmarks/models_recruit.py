"""Symbolic-MoE's claim and the cascade's, on small domain experts: who should answer what, and what does it load?

    python benchmarks/models_recruit.py WORK CORPUS --output docs/results/models-recruit.json

WORK is what `recipes/model_experts/train.py` made. An item is a stretch of held-out text and four continuations, of
which one is the true one. Profiles are made on one half of the documents, everything is judged on the other; each
expert answers each item once, and every rule picks among these answers. Beside the rules stand random experts, the best
single one, the neighbours of an item (kNN on its words), and the oracle, the only headroom that there is.

The cascade lets an answer of the base stand by its confidence and asks the expert that the rule `top1` names otherwise.
It is calibrated on the items of the profile, where that expert looks better than it is, and judged on the others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from model_items import domain_of, items, with_skills
from rich.console import Console
from torch import Tensor

from carpool import CarpoolError
from carpool.artefacts.files import write_text
from carpool.models.gate import Gate
from carpool.models.ledger import Ledger, loads_grouped, loads_one_by_one
from carpool.models.pool import Expert, Pool
from carpool.models.profile import Profile
from carpool.models.questions import Answers, Question, is_right
from carpool.models.recruit import Assignment, recruit
from carpool.models.runners import open_runner
from carpool.models.schedule import answer
from carpool.models.vote import votes

RULES = (  # rule, recruits
    ("random", 1), ("best", 1), ("top1", 1), ("paper", 3), ("repository", 3), ("random", 3),
    ("xshare(budget=1, warmup=0)", 1), ("xshare(budget=2, warmup=0)", 1), ("xshare(budget=3, warmup=0)", 1),
    ("xshare(budget=2, warmup=0) | regret(0.2)", 1), ("des_vote(size=3)", 1), ("xshare(budget=3, warmup=0)", 3),
)  # fmt: skip
NEIGHBOURS = 15
SIGNALS = (("margin",), ("peak",), ("negentropy",), ("variance",), ("margin", "negentropy"))
SHARES = (0.1, 0.25, 0.5, 0.75)


def everybody(pool: Pool, count: int) -> Assignment:
    ids_NK = torch.arange(len(pool)).expand(count, len(pool))
    return Assignment(ids_NK, torch.ones(ids_NK.shape, dtype=torch.float64), torch.zeros(count, dtype=torch.bool))


def right_of(pool: Pool, questions: Sequence[Question], answers: Answers) -> Tensor:
    """Whether each expert is right, float64 `[N, E]`."""
    rows = []
    for one in questions:
        said = [answers.of(one, name) for name in pool.names]
        rows.append([float(is_right(one, each)) for each in said if each is not None])
    return torch.tensor(rows, dtype=torch.float64)


def share(right_N: Tensor) -> dict[str, float]:
    """Mean and the half-width of its 95 % interval over items."""
    half = 1.96 * float(right_N.std()) / math.sqrt(len(right_N))
    return {"right": round(float(right_N.mean()), 4), "half_width": round(half, 4)}


def neighbours(known: Sequence[Question], right_NE: Tensor, questions: Sequence[Question]) -> Tensor:
    """The expert that is right most often on the known items with most words in common, `[M]`."""
    chosen = []
    for one in questions:
        common = torch.tensor([
            len(set(one.skills) & set(other.skills)) / math.sqrt(max(1, len(one.skills)) * max(1, len(other.skills)))
            for other in known
        ])  # fmt: skip
        nearest = common.topk(NEIGHBOURS).indices
        chosen.append(int(right_NE[nearest].sum(0).argmax()))
    return torch.tensor(chosen)


def row(
    pool: Pool, name: str, recruits: int, right_N: Tensor, asked: list[list[int]], best_N: Tensor
) -> dict[str, Any]:
    """One line of the table; `gain` is paired with the best single expert."""
    experts = [[pool.experts[index] for index in one] for one in asked]
    gain_N = right_N - best_N
    return {
        "rule": name, "recruits": recruits, **share(right_N),
        "gain": round(float(gain_N.mean()), 4),
        "gain_half_width": round(1.96 * float(gain_N.std()) / math.sqrt(len(gain_N)), 4),
        "experts_used": len({index for one in asked for index in one}),
        "loads_grouped": loads_grouped(experts).loads, "bytes_grouped": loads_grouped(experts).bytes,
        "loads_one_by_one": loads_one_by_one(experts).loads, "bytes_one_by_one": loads_one_by_one(experts).bytes,
    }  # fmt: skip


def cascades(
    pool: Pool, profile: Profile, sets: Sequence[Sequence[Question]], answers: Answers
) -> list[dict[str, Any]]:
    """The base first, by its confidence; else the expert of `top1`. Calibrated on one set, judged on the other."""
    base, made = pool.index("base"), []
    sides = []
    for questions in sets:
        right_NE = right_of(pool, questions, answers)
        strong_N = right_NE.gather(1, recruit("top1", profile, questions).ids_NK).squeeze(1)
        told = [answers.of(one, "base") for one in questions]
        sides.append((right_NE[:, base], strong_N, [one.confidence for one in told if one is not None]))
    (weak_N, strong_N, told), (weak_M, strong_M, told_M) = sides
    for names in SIGNALS:
        table_NS, table_MS = (torch.tensor([[one[name] for name in names] for one in each]) for each in (told, told_M))
        for passed in SHARES:
            line: dict[str, Any] = {"signals": list(names), "share_asked_for": passed}
            try:
                gate = Gate.calibrate(table_NS, weak_N, strong_N, max_cost=passed)
            except CarpoolError as refusal:
                made.append(line | {"refused": str(refusal)})
                continue
            keep_M = gate.keep(table_MS)
            mixed_M = torch.where(keep_M, weak_M, strong_M)
            kept = float(keep_M.double().mean())
            count = int((~keep_M).sum())
            gain_M = (strong_M - weak_M).sort(descending=True).values
            oracle = float(weak_M.mean() + gain_M[:count].clamp_min(0).sum() / len(gain_M))
            made.append(line | {
                "passed_on": round(1 - kept, 4), **share(mixed_M), "held_out_gain": round(gate.gain, 4),
                "held_out_error": round(gate.error, 4), "oracle": round(oracle, 4),
                "random": round(kept * float(weak_M.mean()) + (1 - kept) * float(strong_M.mean()), 4),
            })  # fmt: skip
    return [{"weak": share(weak_M), "strong": share(strong_M)}, *made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--answers", type=Path, default=None, help="keep answers here (a second run asks nobody)")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    domains = [expert.name for expert in Pool.load(arguments.work / "pool.toml").experts]
    settings = {"context": 1000, "settings": {"dtype": "float32"}}
    pool = Pool(tuple(
        Expert(name, "transformers", str(arguments.work / name), **settings) for name in ("base", *domains)
    ))  # fmt: skip
    raw = [items(arguments.corpus, domains, arguments.items, seed) for seed in (0, 1)]
    known, asked = (with_skills(each, raw[0]) for each in raw)
    answers, ledger = Answers(arguments.answers), Ledger()
    for _ in answer(pool, [*known, *asked], everybody(pool, 2 * arguments.items), open_runner, answers, ledger):
        pass
    profile = Profile.of(pool, known, answers)
    known_NE, right_NE = right_of(pool, known, answers), right_of(pool, asked, answers)
    best_N = right_NE[:, profile.best]

    rows = []
    for rule, recruits in RULES:
        assignment = recruit(rule, profile, asked, recruits=recruits)
        said = votes(pool, asked, assignment, answers)
        right_N = torch.tensor(
            [float(is_right(one, each)) for one, each in zip(asked, said, strict=True) if each]
        ).double()
        rows.append(row(pool, rule, recruits, right_N, [assignment.asked(n) for n in range(len(asked))], best_N))
    near_N = neighbours(known, known_NE, asked)
    rows.append(row(pool, "kNN", 1, right_NE.gather(1, near_N[:, None])[:, 0], [[n] for n in near_N.tolist()], best_N))
    first_N = right_NE.argmax(1)
    rows.append(row(pool, "oracle", 1, right_NE.amax(1), [[n] for n in first_N.tolist()], best_N))
    own_N = torch.tensor([pool.index(domain_of(one)) for one in asked])
    rows.append(row(pool, "the item's domain", 1, right_NE.gather(1, own_N[:, None])[:, 0],
                    [[n] for n in own_N.tolist()], best_N))  # fmt: skip

    result = {
        "what": "the true continuation of held-out text among four", "items": len(asked), "profile_items": len(known),
        "chance": 0.25, "skills": len(profile.skills),
        "experts": {name: share(right_NE[:, place]) | {"bytes": pool.experts[place].bytes}
                    for place, name in enumerate(pool.names)},
        "best": profile.experts[profile.best], "rows": rows,
        "cascade": cascades(pool, profile, (known, asked), answers), "asking": ledger.to_dict()["total"],
    }  # fmt: skip
    write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    for one in rows:
        Console().print(one, soft_wrap=True)


if __name__ == "__main__":
    main()
