"""Domain pruning: what a list of experts made for one domain costs there and elsewhere (EASY-EP, arXiv 2504.06792).

    python benchmarks/domain_pruning.py --calibrate python=A.jsonl law=B.jsonl --evaluate python=C.jsonl law=D.jsonl \\
        --output docs/results/domain-pruning.json

Rows are the domain that a list was made from (and `all`), columns the domain it is evaluated on. Beside EASY-EP's
scores: how often a domain's tokens picked an expert, and lists drawn at random. Without `--evaluate`, the texts of the
reference model are used. Losses are of decoded tokens after a short native prompt; lists are made from text, where the
paper uses prompts with the model's own answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from carpool import parse
from carpool.artefacts.files import sha256_file, write_text
from carpool.artefacts.statistics import Statistics
from carpool.artefacts.texts import Document, load_texts
from carpool.calibrate import calibrate, token_sequences
from carpool.cli.common import progress
from carpool.evaluate.results import provenance
from carpool.evaluate.study import Settings, require_possible, sequences_for, study
from carpool.hosts.transformers import find_layers, fingerprint, load_model
from carpool.routing.batch import Grouping

ALL = "all"
CRITERIA = ("easy_ep", "frequency", "random")


def documents(named: Sequence[str]) -> tuple[list[Document], list[dict[str, str]]]:
    """The documents of `NAME=FILE` arguments, and what identifies the files."""
    found: list[Document] = []
    facts = []
    for entry in named:
        name, _, path = entry.rpartition("=")
        name = name or Path(path).stem
        found += [Document(name, document.text) for document in load_texts([path])]
        facts.append({"domain": name, "sha256": sha256_file(Path(path))})
    return found, facts


def with_criteria(stats: Statistics, domains: Sequence[str], seeds: int) -> tuple[Statistics, dict[str, tuple]]:
    """Statistics whose scores, by `allow_list`'s domain, rank by every criterion; and what each name stands for."""
    meaning: dict[str, tuple[str, str]] = {ALL: ("easy_ep", ALL), "frequency: all": ("frequency", ALL)}
    for domain in domains:
        meaning[domain] = ("easy_ep", domain)
        meaning[f"frequency: {domain}"] = ("frequency", domain)
    for seed in range(seeds):
        meaning[f"random: {seed}"] = ("random", str(seed))
    layers: dict[int, dict[str, Tensor]] = {}
    for place, (index, tensors) in enumerate(stats.layers.items()):
        share = {domain: tensors[f"coverage/{domain}"].float() for domain in domains}
        share = {domain: count_E / count_E.sum() for domain, count_E in share.items()}
        share[ALL] = torch.stack(list(share.values())).mean(0)
        added = {f"easy_ep/{ALL}": tensors["easy_ep"]}
        added |= {f"easy_ep/frequency: {domain}": count_E for domain, count_E in share.items()}
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(1000 * seed + place)
            added[f"easy_ep/random: {seed}"] = torch.rand(stats.num_experts, generator=generator)
        layers[index] = {**tensors, **added}
    return replace(stats, layers=layers), meaning


def overlap(stats: Statistics, domains: Sequence[str], size: int) -> dict[str, dict[str, float]]:
    """Share of two domains' EASY-EP lists that is the same, layers averaged."""
    lists = {
        domain: [set(t[f"easy_ep/{domain}"].topk(size).indices.tolist()) for t in stats.layers.values()]
        for domain in domains
    }
    return {
        one: {
            other: sum(len(a & b) / size for a, b in zip(lists[one], lists[other], strict=True)) / len(lists[one])
            for other in domains
        }
        for one in domains
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers model; default: the reference model")
    parser.add_argument(
        "--calibrate", nargs="+", required=True, metavar="NAME=FILE", help="text the lists are made from"
    )
    parser.add_argument(
        "--evaluate", nargs="+", metavar="NAME=FILE", help="held-out text; default: the reference texts"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of a layer's experts that a list keeps")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration, domains in equal parts")
    parser.add_argument("--sequences", type=int, default=128, help="held-out sequences, domains in equal parts")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a held-out sequence")
    parser.add_argument("--prefill", type=int, default=8, help="of these, the native prompt")
    parser.add_argument("--random", type=int, default=3, help="lists drawn at random")
    parser.add_argument("--fill", choices=("backfill", "drop"), default="backfill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.evaluate is None:
        from carpool_demo import TEXTS

        options.evaluate = [f"{path.stem}={path}" for path in sorted(TEXTS.glob("*.jsonl"))]

    model, tokenizer = load_model(options.model)
    layers = find_layers(model)
    text, calibrated_on = documents(options.calibrate)
    windows = token_sequences(text, tokenizer, options.tokens, 256, options.seed)
    with progress("calibrating", windows.ids_BT.numel()) as advance:
        measured = calibrate(
            model, layers, windows.ids_BT,
            domains=windows.domains, seed=options.seed, energy=True, progress=advance,
        )  # fmt: skip
    domains = sorted(set(windows.domains))
    stats, meaning = with_criteria(measured, domains, options.random)
    size = int(options.share * measured.num_experts)
    plans = {parse(f"allow_list(size={size}, fill={options.fill!r}, domain={name!r})"): name for name in meaning}
    rows = 16
    settings = Settings(
        plans=tuple(plans), grouping=Grouping.parse("batch"), batch_sizes=(rows,), sequence=options.sequence,
        prefill=options.prefill, batches=max(2, options.sequences // rows), seed=options.seed,
    )  # fmt: skip
    held_out, evaluated_on = documents(options.evaluate)
    require_possible(model, settings, stats)
    sequences = sequences_for(settings, held_out, tokenizer)
    with progress("evaluating", settings.num_rows(sequences)) as advance:
        (results,) = study(model, settings, sequences, stats=stats, advance=advance)
    table = [
        {
            "criterion": meaning[plans[result.measured.plan]][0],
            "made_from": meaning[plans[result.measured.plan]][1],
            "kl": asdict(result.kl),
            "union_share": result.union_share.value,
            "perplexity_ratio": {name: asdict(ratio) for name, (_, ratio) in result.domains.items()},
        }
        for result in results[1:]
        if result.measured.plan is not None
    ]
    content = {
        **provenance(),
        "model": {
            "name": "reference model" if options.model is None else Path(options.model).name,
            "fingerprint": fingerprint(model), "layers": len(layers),
            "experts": measured.num_experts, "top_k": measured.top_k,
        },
        "settings": {
            "kept": size, "fill": options.fill, "tokens": measured.tokens, "sequences": len(sequences[0].ids_ST),
            "sequence": options.sequence, "prefill": options.prefill, "seed": options.seed,
        },
        "calibrated_on": calibrated_on,
        "evaluated_on": evaluated_on,
        "stock_perplexity": {name: asdict(value) for name, (value, _) in results[0].domains.items()},
        "overlap": overlap(measured, domains, size),
        "results": table,
    }  # fmt: skip
    write_text(options.output, json.dumps(content, indent=1) + "\n")
    for row in table:
        shown = ", ".join(f"{name} {value['value']:.3f}" for name, value in row["perplexity_ratio"].items())
        print(f"{row['criterion']:10} {row['made_from']:12} perplexity over stock's: {shown}")


if __name__ == "__main__":
    main()
