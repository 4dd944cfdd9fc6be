"""Which experts a pruned model keeps: by REAP's criterion, EASY-EP's scores, or NAEE's search through all sets.

`N` tokens of a chunk, `E` experts, `K` experts per token, `H` hidden size, `P` kept experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from math import comb
from typing import Any, Literal

import torch
from torch import Tensor

from carpool.calibrate.capture import Seen
from carpool.calibrate.divergence import divergence, log_probabilities
from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan
from carpool.plans.pipeline import route
from carpool.policies import AllowList
from carpool.routing.batch import Batch
from carpool.routing.exact import ordered_int, rank_descending
from carpool.routing.keys import with_ties
from carpool.routing.spec import RouteSpec

Pruning = Literal["reap", "easy-ep", "naee"]
STATISTIC: dict[str, str] = {"reap": "reap", "easy-ep": "easy_ep", "naee": "naee"}
MOST_SETS = 5000  # of experts that NAEE tries


def require_searchable(num_experts: int, keep: int) -> None:
    """Raises CarpoolError where a layer has more sets of experts than can be tried."""
    sets = comb(num_experts, keep)
    if sets > MOST_SETS:
        shown = f"{sets:,}" if sets < 10**12 else f"{float(sets):.0e}"
        raise CarpoolError(
            f"--method naee tries every set of {keep} of {num_experts} experts, {shown} of them; it is for models with "
            f"few experts (up to {MOST_SETS:,} sets): use reap or easy-ep"
        )


class Naee:
    """A collector: of every set of `keep` experts, how far the layer's output is from the whole layer's.

    NAEE ("Not All Experts are Equal", arXiv 2402.14800), layer by layer: every layer sees the hidden states of the
    whole model. Tokens are routed anew among the experts of a set.

    Reading of the paper: the distance is one Frobenius norm over all of the text (the released code adds up those of
    its batches).
    """

    def __init__(self, spec: RouteSpec, logits: Callable[[Tensor], Tensor], num_experts: int, keep: int) -> None:
        """Of one layer, whose router gives the `logits` `[N, E]` of hidden states `[N, H]`.

        Raises:
            CarpoolError: more sets than can be tried.
        """
        require_searchable(num_experts, keep)
        self._spec, self._logits = spec, logits
        self.sets = list(combinations(range(num_experts), keep))
        self.lost_S = torch.zeros(len(self.sets), dtype=torch.float64)
        self._experts = num_experts

    def update(self, seen: Seen) -> None:
        """Add a chunk."""
        logits_NE, outputs_NEH = self._logits(seen.hidden_NH), seen.outputs_NEH.double()
        whole_NH = mixed(outputs_NEH, seen.ids_NK, seen.weights_NK)
        batch = Batch.of(len(logits_NE), device=logits_NE.device)
        for place, some in enumerate(self.sets):
            routing = route(Plan(AllowList(experts=some)), self._spec, logits_NE, batch).routing
            left_NH = mixed(outputs_NEH, routing.ids_NK, routing.weights_NK) - whole_NH
            self.lost_S[place] += left_NH.square().sum().cpu()

    def result(self) -> dict[str, Tensor]:
        """`naee [E]`: 1 for the experts of the best set, 0 for the others."""
        best = list(self.sets[int(self.lost_S.argmin())])
        return {"naee": torch.zeros(self._experts).index_fill(0, torch.tensor(best), 1.0)}


def mixed(outputs_NEH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The weighted sum of some experts' outputs, `[N, H]`."""
    index_NKH = ids_NK.long().unsqueeze(-1).expand(-1, -1, outputs_NEH.shape[-1])
    return (outputs_NEH.gather(1, index_NKH) * weights_NK.to(outputs_NEH.dtype).unsqueeze(-1)).sum(1)


def best(score_E: Tensor, keep: int) -> Tensor:
    """The experts of largest score in ascending order, `[P]`; ties as `allow_list(size=...)` breaks them."""
    rank_E = rank_descending(with_ties(ordered_int(score_E)), torch.arange(len(score_E), device=score_E.device))
    return (rank_E < keep).nonzero().squeeze(-1)


def kept(layers: Mapping[int, Mapping[str, Tensor]], method: Pruning, keep: int) -> dict[int, Tensor]:
    """The kept experts of every layer, `[P]`, from its statistics.

    Raises:
        CarpoolError: the model's residual stream was not found, which EASY-EP looks at.
    """
    name = STATISTIC[method]
    missing = [index for index, tensors in layers.items() if name not in tensors]
    if missing:
        raise CarpoolError(
            f"--method {method}: layer {missing[0]} adds its experts' output to no residual stream that could be "
            "found, so that EASY-EP cannot score them; use reap"
        )
    return {index: best(tensors[name], keep) for index, tensors in layers.items()}


def errors(source: Any, made: Any, sequences_BT: Tensor) -> dict[str, float]:
    """What a changed model does to the next token: `kl` (nats a token, of the source's prediction against its own) and
    the perplexities of both, on the second half of every sequence."""
    kl, nats, count = 0.0, [0.0, 0.0], 0
    with torch.inference_mode():
        for ids_BT in sequences_BT.split(8):
            first = ids_BT.shape[1] // 2
            logits = [one(input_ids=ids_BT, use_cache=False).logits[:, first:-1] for one in (source, made)]
            targets_R = ids_BT[:, first + 1 :].flatten()
            done = 0
            for chunks in log_probabilities(*(one.flatten(0, 1) for one in logits)):
                of_R = targets_R[done : done + len(chunks[0])].unsqueeze(-1)
                chosen = [float(log_p.gather(-1, of_R).double().sum()) for log_p in chunks]
                nats = [total - some for total, some in zip(nats, chosen, strict=True)]
                kl += float(divergence(*chunks).double().sum())
                done += len(of_R)
            count += done
    perplexity = [float(torch.tensor(one / count).exp()) for one in nats]
    return {"kl": kl / count, "perplexity": perplexity[1], "perplexity_of_source": perplexity[0], "tokens": count}
