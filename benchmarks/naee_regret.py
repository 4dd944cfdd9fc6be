"""How much worse than the best set of experts are the sets that cheap rankings keep? (NAEE, arXiv 2402.14800)

    python benchmarks/naee_regret.py --output docs/results/naee-regret.json

NAEE tries every set of a layer's experts and keeps the one whose output is closest to the full layer's, which is
possible for up to 16 experts. It is run on random layers, and on the layers of a trained model cut down to the experts
that its text uses most (a layer of its own: the router's softmax over these alone). Loss is the distance of outputs;
regret is loss over the best set's, minus 1. Sets reroute: a token uses its best kept experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from carpool import Batch, RouteSpec, parse, route
from carpool.artefacts.files import write_text
from carpool.calibrate.capture import Experts, Seen, calm, capture
from carpool.calibrate.easy_ep import EasyEP

RANKINGS = ("easy_ep", "gate", "frequency")


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's router logits `[N, E]`, every expert's output `[N, E, H]`, and the residual stream `[N, H]`."""

    spec: RouteSpec
    logits_NE: Tensor
    outputs_NEH: Tensor
    residual_NH: Tensor

    def output(self, kept: tuple[int, ...]) -> Tensor:
        """The layer's output `[N, H]` if only these experts are kept."""
        routing = route(parse(f"allow_list({list(kept)})"), self.spec, self.logits_NE, Batch.of(len(self.logits_NE)))
        ids_NK, weights_NK = routing.routing.ids_NK.long(), routing.routing.weights_NK
        index_NKH = ids_NK.unsqueeze(-1).expand(-1, -1, self.outputs_NEH.shape[-1])
        return (self.outputs_NEH.gather(1, index_NKH) * weights_NK.unsqueeze(-1)).sum(1)


def random_layer(seed: int, num_experts: int = 8, top_k: int = 2, hidden: int = 6, tokens: int = 96) -> Layer:
    """Experts of unequal size that have nothing to do with one another."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_NH, gate_EH, size_E11 = randn(tokens, hidden), randn(num_experts, hidden), randn(num_experts, 1, 1).exp()
    up_EHH, down_EHH = (randn(num_experts, hidden, hidden) / hidden**0.5 for _ in range(2))
    inner_NEH = torch.einsum("nh,ehi->nei", hidden_NH, up_EHH).relu()
    outputs_NEH = torch.einsum("nei,eih->neh", inner_NEH, down_EHH * size_E11)
    return Layer(RouteSpec(top_k), hidden_NH @ gate_EH.T, outputs_NEH, hidden_NH)


def enumerated(layer: Layer, kept: int) -> dict[tuple[int, ...], float]:
    """Loss of every set of `kept` experts."""
    experts = range(layer.logits_NE.shape[1])
    full_NH = layer.output(tuple(experts))
    return {some: float((layer.output(some) - full_NH).double().norm()) for some in combinations(experts, kept)}


def ranked(layer: Layer, kept: int) -> dict[str, tuple[int, ...]]:
    """The set that each ranking keeps."""
    native = layer.spec.native(layer.logits_NE)
    tokens, experts = layer.logits_NE.shape
    ids_NK, weights_NK = native.ids_NK.long(), native.weights_NK
    scores = EasyEP(experts, ("text",))
    domain_N = torch.zeros(tokens, dtype=torch.int64)
    facts = layer.residual_NH, domain_N, domain_N < 0
    scores.update(Seen(layer.residual_NH, layer.outputs_NEH, ids_NK, weights_NK, *facts))
    gate_E = torch.zeros(experts).index_add_(0, ids_NK.flatten(), weights_NK.float().flatten())
    found = {"easy_ep": scores.result()["easy_ep"], "gate": gate_E, "frequency": scores.result()["coverage/text"]}
    return {name: tuple(sorted(score_E.topk(kept).indices.tolist())) for name, score_E in found.items()}


def regret(layer: Layer, kept: int) -> dict[str, float]:
    """Of every ranking, and of a set drawn at random (`any`, the mean over all sets)."""
    losses = enumerated(layer, kept)
    least = min(losses.values())
    found = {name: losses[some] / least - 1 for name, some in ranked(layer, kept).items()}
    return {**found, "any": fmean(losses.values()) / least - 1}


def trained_layers(model: Any, ids_BT: Tensor, experts: int, tokens: int) -> Iterator[Layer]:
    """Every layer of a model, cut down to the experts that most tokens pick and to half its experts per token (a
    quarter of what is left at most), on an even sample of the tokens."""
    from carpool.hosts.transformers import find_layers

    layers = find_layers(model)
    with torch.inference_mode(), calm(model):
        captured = capture(model, layers, ids_BT)
        for layer, routed in zip(layers, captured, strict=True):
            coverage_E = routed.ids_NK.flatten().bincount(minlength=layer.num_experts)
            picked = sorted(coverage_E.topk(experts).indices.tolist())
            some_N = torch.linspace(0, len(routed.hidden_NH) - 1, tokens).long()
            hidden_NH = routed.hidden_NH[some_N].float()
            runner, outputs = Experts(layer), []
            with runner.ready() as run:
                ones_N1 = torch.ones(tokens, 1)
                for expert in picked:
                    outputs.append(run(hidden_NH, torch.full_like(ones_N1, expert, dtype=torch.int64), ones_N1))
            assert routed.residual_NH is not None
            spec = RouteSpec(max(1, min(layer.top_k // 2, experts // 4)), renormalize=True)
            logits_NE = hidden_NH @ layer.weight_EH[picked].float().T
            yield Layer(spec, logits_NE, torch.stack(outputs, 1), routed.residual_NH[some_N].float())


def main() -> None:
    from rich.progress import track

    from carpool.artefacts.texts import load_texts
    from carpool.calibrate import token_sequences
    from carpool.evaluate.results import provenance
    from carpool.hosts.transformers import fingerprint, load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers model; default: the reference model")
    parser.add_argument("--text", nargs="+", type=Path, help="default: the reference texts")
    parser.add_argument("--experts", type=int, default=10, help="that a trained layer is cut down to, 16 at most")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--random-layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.experts > 16:
        parser.error("more than 16 experts cannot be enumerated")
    paths = options.text
    if paths is None:
        from carpool_demo import TEXTS

        paths = sorted(TEXTS.glob("*.jsonl"))
    model, tokenizer = load_model(options.model)
    windows = token_sequences(load_texts(paths), tokenizer, 2048, 128, options.seed)
    kept = options.experts // 2
    results: list[dict[str, Any]] = []
    for seed in track(range(options.random_layers), "random layers"):
        results.append({"layer": f"random {seed}", "experts": 8, "kept": 5, **regret(random_layer(seed), 5)})
    trained = list(trained_layers(model, windows.ids_BT, options.experts, options.tokens))
    for place, layer in enumerate(track(trained, "trained layers")):
        results.append({"layer": f"trained {place}", "experts": options.experts, "kept": kept, **regret(layer, kept)})
    content = {
        **provenance(),
        "model": {"name": "reference model" if options.model is None else Path(options.model).name,
                  "fingerprint": fingerprint(model)},
        "settings": {"tokens": options.tokens, "experts_per_token": trained[0].spec.top_k, "seed": options.seed},
        "results": results,
    }  # fmt: skip
    write_text(options.output, json.dumps(content, indent=1) + "\n")
    for row in results:
        print(row["layer"], {name: round(row[name], 3) for name in (*RANKINGS, "any")})


if __name__ == "__main__":
    main()
