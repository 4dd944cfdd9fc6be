"""A slow twin of TEAM's decoding: one request, lists and loops, the whole text computed anew in every forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusion_twins import block_causal
from torch import Tensor

from carpool.hosts.transformers import find_layers
from carpool.routing.batch import Batch


@dataclass
class Position:
    token: int
    age: int = 0  # forwards with its token
    guess: int = -1
    confidence: float = -1.0


@dataclass
class Decoded:
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # in each forward
    chosen: list[str] = field(default_factory=list)  # the branch of each forward
    voters: list[int] = field(default_factory=list)  # of the last block, over all branches


def decode(
    model: Any, prompt: list[int], *, block: int, mask: int, threshold: float, max_new: int, run: Any,
    cold: tuple[float, int] | None, reuse: bool, branches: bool,
) -> Decoded:  # fmt: skip
    made, text = Decoded(), list(prompt)
    while len(text) - len(prompt) < max_new:
        start = len(text) // block * block
        given = text[start:]
        places = [Position(token) for token in given] + [Position(mask) for _ in range(block - len(given))]
        stored: list[Tensor] | None = None
        first = True
        while any(place.token == mask for place in places):
            missing = [i for i, place in enumerate(places) if place.token == mask]
            surest = sorted(missing, key=lambda i: (-places[i].confidence, i))
            tried = {"as it is": []}
            if branches and not first and len(missing) > 1:
                one, two = surest[:2]
                tried |= {"first": [one], "second": [two], "both": [one, two]}
            votes = []
            for i in range(block):
                hot = True
                if cold is not None and not first and i in missing:
                    guessed = {j for more in tried.values() for j in more}
                    tokens = [j for j in range(block) if j not in missing or j in guessed]
                    hot = places[i].confidence >= cold[0] or any(abs(i - j) <= cold[1] for j in tokens)
                    hot = hot or i in surest[:2]
                votes.append(hot)
            rests = [reuse and place.token != mask and place.age > 0 for place in places]
            texts = {}
            for name, guesses in tried.items():
                texts[name] = text[:start] + [
                    place.guess if i in guesses else place.token for i, place in enumerate(places)
                ]
            made.voters.append(len(tried) * sum(v and not r for v, r in zip(votes, rests, strict=True)))
            logits, outputs = forward(model, list(texts.values()), block, run, votes, rests, stored)
            found = {name: accept(logits[k], texts[name][start:], mask, threshold) for k, name in enumerate(texts)}
            confirmed = {
                name: {i for i, (token, _) in found[name][0].items() if token == places[i].guess} for name in found
            }
            name = "as it is"
            if len(tried) > 1:
                by_first, by_second = one in confirmed[name], two in confirmed[name]
                if by_first and by_second:
                    name = "both"
                elif by_first:
                    name = "both" if two in confirmed["first"] else "first"
                elif by_second:
                    name = "both" if one in confirmed["second"] else "second"
            made.chosen.append(name)
            stored = [output[list(texts).index(name)] for output in outputs]
            made.accepted.append(len(found[name][0]) + len(tried[name]))
            for i, place in enumerate(places):
                if place.token != mask:
                    place.age += 1
                elif i in tried[name]:
                    place.token = place.guess
                else:
                    place.guess, place.confidence = found[name][1][i]
                    if i in found[name][0]:
                        place.token = place.guess
            first = False
        text = text[:start] + [place.token for place in places]
    made.tokens = text[len(prompt) :][:max_new]
    return made


def accept(
    logits_LV: Tensor, tokens: list[int], mask: int, threshold: float
) -> tuple[dict[int, tuple[int, float]], dict[int, tuple[int, float]]]:
    """Accepted predictions, and all predictions, by position."""
    logits_LV = logits_LV.clone()
    logits_LV[:, mask] = -torch.inf
    probabilities_LV = logits_LV.softmax(-1)
    every = {}
    for i in range(len(tokens)):
        token = int(probabilities_LV[i].argmax())
        every[i] = (token, float(probabilities_LV[i, token]))
    missing = {i: every[i] for i, token in enumerate(tokens) if token == mask}
    sure = {i: guess for i, guess in missing.items() if guess[1] > threshold}
    if missing and not sure:
        best = min(missing, key=lambda i: (-missing[i][1], i))
        sure = {best: missing[best]}
    return sure, every


def forward(
    model: Any, texts: list[list[int]], block: int, run: Any, votes: list[bool], rests: list[bool],
    stored: list[Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Logits `[F, L, V]` of the last block of every text, and what each MoE block gave for it, `[F, L, H]`.

    All branches share one group; what rests goes through the experts without a vote, and its output is thrown away.
    """
    F, T = len(texts), len(texts[0])
    last_T = torch.arange(T) >= T - block
    vote_T = torch.cat([torch.ones(T - block, dtype=torch.bool), torch.tensor(votes) & ~torch.tensor(rests)])
    group_FT = torch.where(last_T, 0, 1 + torch.arange(F).unsqueeze(1))
    run.batch = Batch.of(
        F * T, group_N=group_FT.flatten(), num_groups=1 + F, exempt_N=(~last_T).repeat(F), voter_N=vote_T.repeat(F)
    )
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output_FTH: Tensor) -> Tensor:
        changed_FTH = output_FTH.clone()
        for i, resting in enumerate(rests):
            if resting:
                assert stored is not None
                changed_FTH[:, T - block + i] = stored[len(outputs)][i]
        outputs.append(changed_FTH[:, T - block :])
        return changed_FTH

    hooks = [layer.block.register_forward_hook(keep) for layer in find_layers(model)]
    with torch.inference_mode():
        mask = block_causal(T, block, model.dtype).expand(F, -1, -1, -1)
        logits = model(input_ids=torch.tensor(texts), attention_mask=mask, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits[:, -block:], outputs
