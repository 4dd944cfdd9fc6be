"""What sharing costs a model that does not renormalise, with its own rule and with the lost mass made up for.

    python benchmarks/unnormalised_mass.py --output docs/results/unnormalised-mass.json

Models with `norm_topk_prob=False` (OLMoE, Qwen2-MoE) mix by the router's probabilities as they are. Experts that fill
up for displaced ones have smaller probabilities, so less comes out of the layer than natively: `kept` is that,
`rescaled` brings a row's weights to its native sum. The reference model renormalises, so the rule is put on it in two
ways:

    exact       the trained model is stock; `kept` multiplies a changed row by (mass of its experts / native mass),
                which is what the rule does but for the row's constant factor
    converted   the routers do not renormalise, and each layer's experts are scaled by one number, so that the layer
                gives nearly what it gave; stock is this model, whose distance from the trained one is `converted_kl`

Neither was trained with that rule: a model that was may have learned to live with rows of little mass.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from reference import Reference
from torch import Tensor

from carpool.artefacts.files import write_text
from carpool.artefacts.texts import load_texts
from carpool.cli.common import progress
from carpool.evaluate.layout import Layout
from carpool.evaluate.metrics import Result
from carpool.evaluate.study import Settings, require_possible, sequences_for, study
from carpool.hosts.transformers import find_layers
from carpool.plans.grammar import Plan, parse
from carpool.policies import Inputs, Policy
from carpool.routing.batch import Grouping
from carpool.routing.spec import Routing

POLICIES = ("xshare(budget=10)", "xshare(budget=16)", "xshare(budget=26)", "xshare(budget=16, warmup=0)", "oea(k0=2)")
MODELS, MASSES = ("exact", "converted"), ("kept", "rescaled")


def with_mass(policy: Policy, mass: str) -> Policy:
    """The policy, whose changed rows mix with the `kept` mass of their experts or are `rescaled` to the native one."""
    kind: Any = type(policy)

    def assign(self: Any, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        routing = kind.assign(self, inputs, allowed_NE, coreset_GE)
        share_N1 = mass_share(inputs, routing)
        if mass == "kept":
            factor_N1 = share_N1 if inputs.spec.renormalize else torch.ones_like(share_N1)
        else:
            factor_N1 = torch.ones_like(share_N1) if inputs.spec.renormalize else 1 / share_N1
        return replace(routing, weights_NK=routing.weights_NK * factor_N1)

    made = type(kind.__name__, (kind,), {"assign": assign})
    return made(**{field.name: getattr(policy, field.name) for field in fields(policy)})  # type: ignore[no-any-return]


def mass_share(inputs: Inputs, routing: Routing) -> Tensor:
    """Probability of the experts that a row is given over that of its native ones, `[N, 1]`."""
    given_NK = inputs.weights_NE.gather(-1, routing.ids_NK.long()) * (routing.weights_NK != 0)
    return given_NK.sum(-1, keepdim=True) / inputs.native_weight_NK.sum(-1, keepdim=True).float()


def convert(reference: Reference, ids_ST: Tensor) -> list[float]:
    """Take renormalisation from the routers; returns each layer's factor on its experts' output: the least squares of
    factor times native mass against 1, over these sequences."""
    logits_LNE, factors = reference.record(ids_ST).logits_LNE, []
    for layer, logits_NE in zip(reference.layers, logits_LNE, strict=True):
        mass_N = logits_NE.softmax(-1).topk(layer.top_k, dim=-1).values.sum(-1).double()
        factors.append(float(mass_N.sum() / mass_N.square().sum()))
        router: Any = layer.router
        experts: Any = layer.experts
        router.norm_topk_prob = False
        with torch.no_grad():
            experts.down_proj.mul_(factors[-1])
    reference.layers = find_layers(reference.model)  # rules are read from the routers
    assert not any(layer.spec.renormalize for layer in reference.layers)
    return factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    reference = Reference()
    plans = [Plan(with_mass(parse(text).policy, mass)) for text in POLICIES for mass in MASSES]
    settings = Settings(
        plans=tuple(plans), grouping=Grouping.parse("batch"), batch_sizes=(16,), batches=options.batches,
        seed=options.seed,
    )  # fmt: skip
    require_possible(reference.model, settings, None)
    sequences = sequences_for(settings, load_texts(reference.paths), reference.tokenizer)
    content = reference.facts(batch=16, batches=options.batches, seed=options.seed)
    found = []
    with progress("evaluating", 2 * settings.num_rows(sequences)) as advance:
        for model in MODELS:
            if model == "converted":
                before_RV = logits(reference, settings.layouts()[0], sequences[0].ids_ST)
                content["factors"] = convert(reference, reference.sequences(16, 128, options.seed + 1).ids_ST)
                after_RV = logits(reference, settings.layouts()[0], sequences[0].ids_ST)
                content["converted_kl"] = divergence(before_RV, after_RV)
            (results,) = study(reference.model, settings, sequences, advance=advance)
            content[f"{model}_perplexity"] = results[0].perplexity.value
            found += [row(model, MASSES[place % 2], result) for place, result in enumerate(results[1:])]
    content["results"] = found
    write_text(options.output, json.dumps(content, indent=1) + "\n")
    print({name: content[name] for name in ("factors", "converted_kl", "exact_perplexity", "converted_perplexity")})
    for entry in found:
        print(entry)


def logits(reference: Reference, layout: Layout, ids_ST: Tensor) -> Tensor:
    """Native logits of the decoded positions of one batch."""
    with torch.inference_mode():
        return layout.logits(reference.model, ids_ST[: layout.batch_size])


def divergence(stock_RV: Tensor, other_RV: Tensor) -> float:
    """Mean KL, nats a token."""
    p_RV, q_RV = stock_RV.double().log_softmax(-1), other_RV.double().log_softmax(-1)
    return float((p_RV.exp() * (p_RV - q_RV)).sum(-1).mean())


def row(model: str, mass: str, result: Result) -> dict[str, Any]:
    return {
        "model": model,
        "mass": mass,
        "policy": result.measured.name,
        "union": result.union.value,
        "displaced_mass": result.displaced_mass.value,
        "kl": asdict(result.kl),
        "perplexity_ratio": asdict(result.perplexity_ratio),
    }


if __name__ == "__main__":
    main()
