"""Fast or slow: what selectors of a mode get right for the tokens that they spend, on a model with two modes.

    python benchmarks/models_modes.py WORK --output docs/results/models-modes.json

WORK holds what `recipes/model_experts/modes.py` made. Gates are calibrated to a budget of tokens on one set of sums and
judged on another. Beside them stand always fast, always slow, a random choice at equal tokens, the oracle (which asks
slowly only what fast gets wrong and slow right), and the control that looks at the prompt's length alone. The second
set is drawn as the first; long easy sums (mostly zeros) and short hard ones are shown apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from carpool import CarpoolError
from carpool.artefacts.files import write_text
from carpool.models.cascade import asked, signals_of
from carpool.models.gate import Gate
from carpool.models.ledger import Ledger
from carpool.models.modes import PromptSelector
from carpool.models.pool import Pool
from carpool.models.questions import Answers, Question, is_right
from carpool.models.runners import open_runner

sys.path.append(str(Path(__file__).parents[1] / "recipes/model_experts"))

import modes

BUDGETS = (2.0, 4.0, 6.0, 8.0)  # tokens that the slow mode may write, a mean over all items
ANSWER = (("margin",), ("least",))  # an answer is one token here: its mean is its least
LONG, SHORT = 7, 4  # terms


def sums(count: int, seed: int) -> list[Question]:
    rng = random.Random(f"sums {seed}")
    found: dict[str, Question] = {}
    while len(found) < count:
        numbers = modes.terms(rng)
        put = modes.question(numbers)
        found[put] = Question(put, put, answer=modes.answer(numbers, slow=False))
    return list(found.values())


def half(values: Tensor) -> float:
    return 1.96 * float(values.double().std()) / math.sqrt(len(values))


class Side:
    """Both modes' answers to some questions."""

    def __init__(self, pool: Pool, questions: list[Question], ledger: Ledger) -> None:
        self.prompts = [one.question for one in questions]
        said = {name: asked(pool, name, questions, open_runner, Answers(), ledger) for name in ("fast", "slow")}
        self.fast = said["fast"]
        self.right = {
            name: torch.tensor([is_right(one, each) for one, each in zip(questions, made, strict=True)]).double()
            for name, made in said.items()
        }
        self.cost = {name: torch.tensor([float(one.written) for one in made]) for name, made in said.items()}
        self.terms_N = torch.tensor([len(put.split()) // 2 for put in self.prompts])
        self.zeros_N = torch.tensor([put.count("0") for put in self.prompts])


def judged(side: Side, slow_N: Tensor, fast_first: bool) -> dict[str, Any]:
    """A selector's choice on items, and chance and oracle at equal tokens."""
    fast, slow = side.right["fast"], side.right["slow"]
    right_N = torch.where(slow_N, slow, fast)
    spent_N = torch.where(
        slow_N, side.cost["slow"].double() + (side.cost["fast"] if fast_first else 0.0), side.cost["fast"]
    )
    tokens, cheap = float(spent_N.mean()), float(side.cost["fast"].double().mean())
    more_N = (side.cost["slow"] - side.cost["fast"]).double()  # neither chance nor oracle writes both answers
    share = min(1.0, (tokens - cheap) / float(more_N.mean()))
    worth_N = (slow - fast) / more_N
    left, oracle = tokens - cheap, float(fast.mean())
    for place in worth_N.argsort(descending=True).tolist():
        price = float(more_N[place]) / len(more_N)
        if worth_N[place] <= 0 or price > left:
            break
        left, oracle = left - price, oracle + float(slow[place] - fast[place]) / len(more_N)
    long_easy = (side.terms_N >= LONG) & (side.zeros_N >= side.terms_N / 2)
    short_hard = (side.terms_N <= SHORT) & (side.zeros_N == 0)
    return {
        "tokens": round(tokens, 2), "right": round(float(right_N.mean()), 4), "half_width": round(half(right_N), 4),
        "random": round(share * float(slow.mean()) + (1 - share) * float(fast.mean()), 4), "oracle": round(oracle, 4),
        "slow_share": round(float(slow_N.double().mean()), 4),
        "slow_of_long_easy": round(float(slow_N[long_easy].double().mean()), 4),
        "slow_of_short_hard": round(float(slow_N[short_hard].double().mean()), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    pool, ledger = Pool.load(arguments.work / "modes.toml"), Ledger()
    every = sums(2 * arguments.items, 1)
    first, second = (Side(pool, every[part::2], ledger) for part in (0, 1))
    fine_N = first.right["fast"] >= first.right["slow"]
    signals: dict[str, tuple[Tensor, Tensor, bool]] = {
        " + ".join(names): (signals_of(first.fast, names), signals_of(second.fast, names), True) for names in ANSWER
    }
    for name, alone in (("prompt", False), ("prompt length alone", True)):
        selector = PromptSelector.fit(first.prompts, fine_N, length_only=alone)
        signals[name] = (selector.signal(first.prompts), selector.signal(second.prompts), False)
    nobody = torch.zeros(len(second.prompts), dtype=torch.bool)
    rows = [
        {"selector": "always fast", **judged(second, nobody, True)},
        {"selector": "always slow", **judged(second, ~nobody, False)},
    ]
    for name, (told_N, told_M, fast_first) in signals.items():
        for budget in BUDGETS:
            line: dict[str, Any] = {"selector": name, "budget": budget}
            try:
                gate = Gate.calibrate(
                    told_N, first.right["fast"], first.right["slow"], max_cost=budget, cost_N=first.cost["slow"]
                )
            except CarpoolError as refusal:
                rows.append(line | {"refused": str(refusal)})
                continue
            slow_N = ~gate.keep(told_M)
            spent = float((slow_N * second.cost["slow"]).mean())
            rows.append(line | {
                "slow_tokens": round(spent, 2), "slow_tokens_half_width": round(half(slow_N * second.cost["slow"]), 2),
                "held_out_gain": round(gate.gain, 4), "held_out_error": round(gate.error, 4),
                **judged(second, slow_N, fast_first),
            })  # fmt: skip
    result = {"items": len(second.prompts), "calibrated_on": len(first.prompts), "rows": rows,
              "loads": ledger.loads, "answers": ledger.to_dict()["total"]}  # fmt: skip
    write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    for row in rows:
        Console().print(row, soft_wrap=True)


if __name__ == "__main__":
    main()
