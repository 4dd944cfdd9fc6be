"""What caches of experts would hit on the routing of trained models, and what sharing changes: for `offload.py`.

Routing is recorded from texts of the demo, every sequence alone and all of it, as decoding would route it. Rules that
are fitted are fitted on every second request and scored on the others. Hit rates begin with an empty memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.texts import load_texts
from carpool.hosts.transformers import find_layers, load_model, share
from carpool.offloading import timeline
from carpool.offloading.accesses import Accesses, lockstep
from carpool.offloading.bootstrap import ratio
from carpool.offloading.recorded import Requests
from carpool.offloading.rules import Belady, rule_names, rule_of
from carpool.offloading.simulate import Simulated, simulate
from carpool.offloading.summary import summarise

LENGTH = 272  # tokens of a sequence
BATCH = 16
SHARED = ("oea(k0=5)", "xshare(budget=0.5)", "xshare(budget=0.25)")
SHARES = (0.25, 0.5)  # of a layer's experts that memory holds
OWN = ("lru", "lfu", "lfru", "sequence_lfu", "pinned", "belady")  # every layer has its part of the memory
COMMON = ("lru", "lfu", "layer_distance", "hobbit", "matched", "belady")  # all layers share it
SCORED = 16  # requests that rules are scored on


def sequences(tokenizer: Any, files: Sequence[Any], count: int) -> Tensor:
    """Token ids `[count, LENGTH]`, domains in turn, from the beginnings of documents."""
    found: list[list[Tensor]] = []
    for file in files:
        documents = load_texts([file])
        ids = (tokenizer(one.text, return_tensors="pt").input_ids[0] for one in documents if len(one.text) > LENGTH)
        found.append([one[:LENGTH] for one, _ in zip((i for i in ids if len(i) >= LENGTH), range(count), strict=False)])
    turns = [domain[place] for place in range(count) for domain in found if place < len(domain)]
    return torch.stack(turns[:count])


def record(model: Any, ids_RT: Tensor) -> tuple[Requests, Tensor, float]:
    """Who chose whom, what the next layer's router would have foretold `[R, T, L, K]`, and how much of it is right."""
    layers = find_layers(model)
    chosen: list[list[Tensor]] = [[] for _ in layers]
    mixed: list[list[Tensor]] = [[] for _ in layers]
    ahead: list[list[Tensor]] = [[] for _ in layers]

    def keep(place: int) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            native = layers[place].routed(output)[1]
            chosen[place].append(native.ids_NK.long())
            mixed[place].append(native.weights_NK.float())
            if place + 1 < len(layers):
                coming, hidden_NH = (
                    layers[place + 1],
                    args[0].reshape(-1, args[0].shape[-1]),
                )
                ahead[place].append(coming.spec.native(hidden_NH @ coming.weight_EH.mT).ids_NK.long())

        return hook

    handles = [layer.router.register_forward_hook(keep(place)) for place, layer in enumerate(layers)]
    with torch.no_grad():
        for ids_T in ids_RT:
            model(ids_T.unsqueeze(0))
    for handle in handles:
        handle.remove()
    experts, weights = (torch.stack([torch.stack(one) for one in part], 2) for part in (chosen, mixed))
    told = torch.stack([torch.stack(one) for one in ahead[:-1]], 2)
    right = (told.unsqueeze(-1) == experts[:, :, 1:].unsqueeze(-2)).any(-1).double().mean()
    told = torch.cat([told, torch.full_like(told[:, :, :1], -1)], 2)
    return (
        Requests(list(experts), list(weights), layers[0].num_experts),
        told,
        float(right),
    )


@torch.no_grad()
def record_shared(model: Any, ids_RT: Tensor, plan: str) -> tuple[Requests, float]:
    """The same while `BATCH` sequences share in step, and KL(stock || shared) a token."""
    held: dict[int, list[Tensor]] = {}
    experts, lost = [], []
    for rows_BT in ids_RT.split(BATCH):
        stock = model(rows_BT).logits.log_softmax(-1)
        held.clear()

        def keep(place: int, batch: Any, outcome: Any) -> None:
            routing = outcome.routing
            held.setdefault(place, []).append(torch.where(routing.weights_NK == 0, -1, routing.ids_NK.long()))

        with share(model, plan, group="position", observe=keep, exempt_prefill=False):
            shared = model(rows_BT).logits.log_softmax(-1)
        lost.append((stock.exp() * (stock - shared)).sum(-1).mean())
        shape = (*rows_BT.shape, -1)
        experts += list(torch.stack([torch.cat(held[place]).reshape(shape) for place in sorted(held)], 2))
    return Requests(experts, None, find_layers(model)[0].num_experts), float(torch.stack(lost).mean())


def by_request(found: Simulated, accesses: Accesses) -> dict[str, Any]:
    """Hit rate with its interval over requests (batches of them), and what a step reads."""
    starts = [*accesses.begins_S.nonzero().flatten().tolist(), len(accesses)]
    parts = [slice(one, end) for one, end in pairwise(starts)]
    uses_R = torch.stack([found.uses_SL[part].sum() for part in parts])
    hits_R = uses_R - torch.stack([found.misses_SL[part].sum() for part in parts])
    value, low, high = ratio(hits_R, uses_R)
    return {
        "hit_rate": value,
        "low": low,
        "high": high,
        "experts_read": found.read_per_step(),
    }


def caches(requests: Requests, batch: int) -> list[dict[str, Any]]:
    """Every rule at every size, for a batch."""
    half, other = requests.split()
    known = lockstep(half.experts, requests.num_experts, batch, half.weights)
    weights = None if other.weights is None else other.weights[:SCORED]
    accesses = lockstep(other.experts[:SCORED], requests.num_experts, batch, weights)
    rules = {name: rule_of(name, known) for name in rule_names()} | {"belady": Belady.fit(accesses)}
    L = accesses.needed_SLE.shape[1]
    rows = []
    for part in SHARES:
        size = int(part * requests.num_experts)
        for name, scope in [*((name, "layer") for name in OWN), *((name, "model") for name in COMMON)]:
            found = simulate(accesses, rules[name], size * (L if scope == "model" else 1), scope=scope)
            rows.append({"share": part, "rule": name, "scope": scope, "batch": batch, **by_request(found, accesses)})
    return [row | {"union": accesses.mean_union} for row in rows]


def fetching(requests: Requests, told: Tensor, right: float) -> dict[str, Any]:
    """What fetching ahead would save, where an expert takes as long to read as two layers to compute."""
    half, other = requests.split()
    known = lockstep(half.experts, requests.num_experts)
    accesses = lockstep(other.experts[:SCORED], requests.num_experts)
    link, size = timeline.Link(expert=2.0, layer=1.0), requests.num_experts // 4
    told_SLK = told[1::2][:SCORED].flatten(0, 1)
    ways = {
        "none": None, "next layer's gates": timeline.by_gates(told_SLK),
        "as the step before": timeline.as_before(accesses), "successors": timeline.successors(known, told.shape[-1]),
    }  # fmt: skip
    rows = {}
    for name, way in ways.items():
        found = timeline.run(accesses, rule_of("lru"), size, link, foretell=way)
        rows[name] = {
            "seconds": found.seconds, "stalled": found.stall_share, "read": found.read / len(accesses),
            "misses": found.misses / found.uses, "precision": found.precision,
        }  # fmt: skip
    return {"gates_right": right, "rows": rows}


def study(model_name: str | None, files: Sequence[Any], count: int) -> dict[str, Any]:
    """How local a model's routing is, what fetching ahead and caches make of it, and what sharing changes."""
    model, tokenizer = load_model(model_name)
    ids_RT = sequences(tokenizer, files, count)
    requests, told, right = record(model, ids_RT)
    found: dict[str, Any] = {
        "requests": len(ids_RT), "tokens": ids_RT.numel(), "experts": requests.num_experts,
        "summary": summarise(requests).as_json(),
        "fetching": fetching(requests, told, right), "caches": [], "shared": [],
    }  # fmt: skip
    del found["summary"]["load"]
    found["caches"] = [row for batch in (1, 4, BATCH) for row in caches(requests, batch)]
    for plan in SHARED:
        shared, lost = record_shared(model, ids_RT, plan)
        rows = [row for row in caches(shared, BATCH) if row["rule"] in ("lru", "lfu", "belady")]
        found["shared"].append({"policy": plan, "kl": lost, "caches": rows})
    return found
