"""Do the samples of one prompt share experts better than strangers do? What sharing among them reads and costs.

Prompts of the held-out texts are continued by the model itself, at temperature 1. Siblings are samples of one prompt;
strangers are samples of as many prompts, one each. Both decode in lockstep, teacher-forced on what was sampled, each
as one group; and samples of several prompts decode in one step, grouped by prompt or all together.

    python benchmarks/siblings.py --output docs/results/siblings.json
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from reference import Reference

from carpool import Batch, Grouping, Outcome, parse
from carpool.artefacts.texts import load_texts
from carpool.evaluate.intervals import estimate
from carpool.evaluate.layout import Layout, Part
from carpool.evaluate.loop import Loop
from carpool.evaluate.measure import parts
from carpool.evaluate.metrics import results
from carpool.evaluate.results import write_rows
from carpool.evaluate.sequences import Sequences, draw

WIDEST = 16  # samples of one prompt, and strangers of one batch
BUDGETS = {2: (8, 10, 12), 4: (10, 14, 18), 8: (12, 18, 26), 16: (16, 26, 36)}  # by sequences of a group
OTHERS = ("oea(k0=2)", "topk(k=4)")
PROMPTS, SAMPLES = 4, 4  # of the steps that hold several prompts
BY_PROMPT, BY_BATCH = ("xshare(budget=10)", "xshare(budget=14)", "oea(k0=2)"), (20, 26, 32, 38)
WINDOWS = ((0, 8), (8, 32), (32, 96))  # decoding steps
SHOWN = ("union", "bytes", "bytes_share", "kl", "top1_agreement", "displaced_mass", "perplexity_ratio")
CHUNK = 64  # sequences that are sampled at once


@dataclass(frozen=True, eq=False)
class Samples:
    """Every batch of prompts has `WIDEST` documents' prompts, and shares none with another.

    Attributes:
        ids_MPST: sequences of prompt and continuation: `M` batches of `P` prompts with `S` samples each. How many
            samples a prompt has depends on its place; what is not there is -1.
        domain_MP: of every prompt.
    """

    ids_MPST: Tensor
    domain_MP: Tensor
    domains: tuple[str, ...]

    def take(self, prompts: int, samples: int) -> Sequences:
        """The first prompts of every batch and the first samples of each, prompt by prompt."""
        ids_ST = self.ids_MPST[:, :prompts, :samples].flatten(0, 2)
        assert bool((ids_ST >= 0).all()), "samples that were not drawn"
        domain_S = self.domain_MP[:, :prompts, None].expand(-1, -1, samples).flatten()
        return Sequences(ids_ST, domain_S, self.domains, len(self.ids_MPST))


class ByStep:
    """The natural union of every decoding step, `[M, steps]` a pass, layers averaged."""

    def __init__(self) -> None:
        self.passes: list[Tensor] = []

    def begin(self, layout: Layout, part: Part) -> None:
        self._layout, self._layers = layout, list[Tensor]()

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        union_MS = outcome.natural_SE.sum(-1).view(-1, self._layout.steps + 1)
        self._layers.append(union_MS[:, : self._layout.steps].double())

    def finish(self, part: Part, found: Any) -> None:
        self.passes.append(torch.stack(self._layers).mean(0))


def sample(reference: Reference, prompts_SP: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Prompts and `tokens` tokens of the model at temperature 1, `[S, P + tokens]`; the text does not end."""
    model, end, made = reference.model, reference.model.config.eos_token_id, [prompts_SP]
    with torch.inference_mode():
        fed, cache = prompts_SP, None
        for _ in range(tokens):
            out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            probabilities_SV = out.logits[:, -1].float().softmax(-1)
            probabilities_SV[:, end] = 0
            fed = torch.multinomial(probabilities_SV, 1, generator=generator)
            made.append(fed)
    return torch.cat(made, 1)


def draw_samples(reference: Reference, given: argparse.Namespace) -> Samples:
    """The prompts and their continuations: `WIDEST` samples of the first two prompts of a batch, `SAMPLES` of the first
    `PROMPTS`, one of all others."""
    documents = load_texts(reference.paths)
    count = given.batches * WIDEST
    prompts = draw(documents, reference.tokenizer, count=count, length=given.prefill - 1, seed=given.seed,
                   batches=given.batches)  # fmt: skip
    wanted = [WIDEST if place < 2 else SAMPLES if place < PROMPTS else 1 for place in range(WIDEST)]
    number_S = torch.arange(count).repeat_interleave(torch.tensor(wanted * given.batches))
    generator = torch.Generator().manual_seed(given.seed)
    pieces = track(number_S.split(CHUNK), "sampling")
    made = [sample(reference, prompts.ids_ST[piece], given.decoded + 1, generator) for piece in pieces]
    ids_MPST = torch.full((count, WIDEST, given.prefill + given.decoded + 1), -1)
    place_S = torch.cat([torch.arange(wanted[prompt % WIDEST]) for prompt in range(count)])
    ids_MPST[number_S, place_S] = torch.cat(made)
    by_batch = (given.batches, WIDEST)
    return Samples(ids_MPST.unflatten(0, by_batch), prompts.domain_S.view(by_batch), prompts.domains)


def measured(
    reference: Reference, sequences: Sequences, layout: Layout, plans: list[str], head: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for stock and for every plan, every batch of the layout an independent one."""
    batches = len(sequences.ids_ST) // layout.batch_size
    passes = parts(reference.model, sequences, layout, batches)
    loop = Loop(reference.model, reference.moe, layout, passes, sequences.domains, stats=reference.stats)
    stock = ByStep()
    found = results(loop.run([parse(text) for text in plans], watchers=[stock, *(None for _ in plans)]))
    rows = [
        head | {"policy": one.measured.name, "group": str(layout.grouping), "batches": batches,
                "tokens": int(one.measured.tokens_M.sum()), "changed_rows": one.measured.changed_rows,
                **{name: asdict(getattr(one, name)) for name in SHOWN}}
        for one in found
    ]  # fmt: skip
    union_MS, ones_M = torch.cat(stock.passes).numpy(), np.ones(batches)
    windows = [(first, min(last, layout.steps)) for first, last in WINDOWS if first < layout.steps]
    rows[0]["union_by_steps"] = [
        {"first": first, "last": last, **asdict(estimate(union_MS[:, first:last].mean(1), ones_M))}
        for first, last in windows
    ]
    return rows


def table(reference: Reference, samples: Samples, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Siblings beside strangers, for every number of sequences; then several prompts in one step."""
    positions = given.prefill + given.decoded
    by_prompt, by_batch = Grouping.parse("prompt"), Grouping.parse("batch")
    made: list[dict[str, Any]] = []
    for n, budgets in track(BUDGETS.items(), "measuring"):
        plans = [*(f"xshare(budget={budget})" for budget in budgets), *OTHERS]
        siblings = Layout(n, positions, given.prefill, by_prompt, samples=n)
        strangers = Layout(n, positions, given.prefill, by_batch)
        made += measured(reference, samples.take(2, n), siblings, plans, {"who": "siblings", "sequences": n})
        made += measured(reference, samples.take(n, 1), strangers, plans, {"who": "strangers", "sequences": n})
    several = Layout(PROMPTS * SAMPLES, positions, given.prefill, by_prompt, samples=SAMPLES)
    head = {"who": "prompts", "sequences": several.batch_size}
    sequences = samples.take(PROMPTS, SAMPLES)
    made += measured(reference, sequences, several, list(BY_PROMPT), head)
    together = replace(several, grouping=by_batch)
    made += measured(reference, sequences, together, [f"xshare(budget={budget})" for budget in BY_BATCH], head)[1:]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=10, help="of strangers; siblings have twice as many")
    parser.add_argument("--prefill", type=int, default=32)
    parser.add_argument("--decoded", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    reference = Reference()
    rows = table(reference, draw_samples(reference, given), given)
    write_rows(given.output, rows, kind="carpool siblings", **reference.head(given))


if __name__ == "__main__":
    main()
