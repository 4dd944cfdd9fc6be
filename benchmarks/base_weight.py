"""BASE's open question: does an expert's energy count the weight before renormalisation, or after?

    python benchmarks/base_weight.py --output docs/results/base-weight.json

The paper does not say. `base` takes the weight before; here both are measured on the same batches. On a model that does
not renormalise the two are the same.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from carpool.artefacts.files import write_text
from carpool.artefacts.texts import load_texts
from carpool.cli.common import embedded_texts, load, model_facts, progress
from carpool.evaluate.metrics import Result
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.study import Settings, require_possible, sequences_for, study
from carpool.plans.grammar import Plan
from carpool.policies import BASE, Inputs
from carpool.routing.batch import Grouping


@dataclass(frozen=True)
class AfterRenormalisation(BASE):
    """BASE with each row's weights divided by their sum over its native experts."""

    def weight_NE(self, inputs: Inputs) -> Tensor:
        weight_NE = super().weight_NE(inputs)
        return weight_NE / weight_NE.sum(-1, keepdim=True).clamp_min(1e-20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers model; default: the reference model")
    parser.add_argument("--stats", type=Path, help="its statistics (`carpool calibrate --energy`)")
    parser.add_argument("--text", nargs="+", type=Path, help="default: the reference texts")
    parser.add_argument("--budgets", nargs="+", type=int, default=[16, 26, 40])
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    paths = options.text or embedded_texts()
    model, tokenizer, stats = load(options.model, options.stats)
    plans = [(kind, Plan(kind(budget))) for budget in options.budgets for kind in (BASE, AfterRenormalisation)]
    settings = Settings(
        plans=tuple(plan for _, plan in plans), grouping=Grouping.parse("batch"), batch_sizes=(16,),
        batches=options.batches, seed=options.seed,
    )  # fmt: skip
    require_possible(model, settings, stats)
    sequences = sequences_for(settings, load_texts(paths), tokenizer)
    with progress("evaluating", settings.num_rows(sequences)) as advance:
        (results,) = study(model, settings, sequences, stats=stats, advance=advance)

    def row(kind: type[BASE], result: Result) -> dict[str, object]:
        return {
            "weight": "after" if kind is AfterRenormalisation else "before",
            "policy": result.measured.name,
            "union": result.union.value,
            "kl": asdict(result.kl),
            "perplexity_ratio": asdict(result.perplexity_ratio),
        }

    content = {
        **provenance(),
        "model": model_facts(model, options.model),
        "texts": text_facts(paths),
        "settings": {"batch": 16, "batches": options.batches, "sequence": 128, "prefill": 32, "seed": options.seed},
        "results": [row(kind, result) for (kind, _), result in zip(plans, results[1:], strict=True)],
    }
    write_text(options.output, json.dumps(content, indent=1) + "\n")
    for entry in content["results"]:
        print(entry)


if __name__ == "__main__":
    main()
