"""Allow lists: a fixed set of experts per layer, for instance those that one domain needs (EASY-EP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy, drop
from carpool.policies.parameters import require, resolve_budget
from carpool.policies.registry import register
from carpool.routing.exact import ordered_int, rank_descending
from carpool.routing.keys import with_ties
from carpool.routing.spec import Routing


@register
@dataclass(frozen=True)
class AllowList(Policy):
    """Every token uses the experts of a fixed list only.

    The deployment of EASY-EP (arXiv 2504.06792): a domain needs few of a model's experts, and a handful of samples
    from it (prompts with the model's own answers) finds them. The list bounds the union at every batch size.

    Parameters:
        experts: the allowed experts. Lists that differ by layer come from a policy file.
        size: instead of `experts`: the layer's `size` experts with the highest score in the statistics; an int
            counts experts, a float in (0, 1] is a share of `E`. The paper keeps a half or a quarter.
        domain: with `size`, the domain whose scores count; default: the mean over all domains of the statistics.
        score: with `size`, whose scores: `easy_ep`, or `reap` (REAP, arXiv 2510.13999: an expert's mean of weight times
            output norm over its tokens; of all domains together).
        fill: `backfill` gives a token its next best allowed experts, `drop` only the native ones that are allowed
            (and its best allowed one if there are none).

    Statistics: with `size`, `easy_ep [E]`, `reap [E]` or `easy_ep/DOMAIN [E]` (`carpool calibrate --energy`).

    Reading of the paper: an expert outside the list is never chosen, also where its score is the only one that is
    left of the groups a row may use (the released mask lets it through there).

    Identity: all experts, or `size=E`.

    Example: `allow_list(size=0.5)`.
    """

    experts: tuple[int, ...] | None = None
    size: int | float | None = None
    fill: Literal["backfill", "drop"] = "backfill"
    domain: str | None = None
    score: Literal["easy_ep", "reap"] = "easy_ep"

    name = "allow_list"
    paper = "EASY-EP, arXiv 2504.06792"
    kind = "token"

    def __post_init__(self) -> None:
        one = (self.experts is None) != (self.size is None)
        require(one, "allow_list takes either experts=[...] or size=..., one of them and not both")
        good = self.domain is None or (isinstance(self.domain, str) and self.domain != "" and self.size is not None)
        require(good, f"domain={self.domain!r}: give the name of a domain of the statistics, together with size=...")
        require(self.fill in ("backfill", "drop"), f"fill={self.fill!r}: use 'backfill' or 'drop'")
        require(self.score in ("easy_ep", "reap"), f"score={self.score!r}: use 'easy_ep' or 'reap'")
        whose = self.score == "easy_ep" or (self.size is not None and self.domain is None)
        require(whose, f"score={self.score!r}: it goes with size=..., and there is none of single domains")
        if self.experts is not None:
            good = isinstance(self.experts, list | tuple) and all(type(e) is int and e >= 0 for e in self.experts)
            require(good and len(self.experts) > 0, f"experts={self.experts!r}: give a list of expert ids")
            object.__setattr__(self, "experts", tuple(sorted(set(self.experts))))

    def check(self, num_experts: int, top_k: int) -> None:
        if self.experts is not None:
            require(
                self.experts[-1] < num_experts,
                f"allow_list: expert {self.experts[-1]} of a layer with {num_experts} experts (0 to {num_experts - 1})",
            )
        if self.size is not None:
            resolve_budget("size", self.size, num_experts)

    def required_stats(self) -> tuple[str, ...]:
        if self.size is None:
            return ()
        return (self.score,) if self.domain is None else (f"easy_ep/{self.domain}",)

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`allow [E]` bool."""
        if self.size is None:
            return {}
        (scores_E,) = (stats[name] for name in self.required_stats())
        size = resolve_budget("size", self.size, scores_E.shape[-1])
        experts_E = torch.arange(len(scores_E), device=scores_E.device)
        return {"allow": rank_descending(with_ties(ordered_int(scores_E)), experts_E) < size}

    def coreset(self, inputs: Inputs) -> Tensor:
        """The list, bool `[G, E]`."""
        return self._allow_E(inputs).expand(inputs.batch.num_groups, -1)

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """The list alone, bool `[N, E]`: what other rows read for free does not count, or rows would see the batch."""
        return self._allow_E(inputs).expand(inputs.scores_NE.shape)

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        return drop(inputs, allowed_NE) if self.fill == "drop" else super().assign(inputs, allowed_NE, coreset_GE)

    def _allow_E(self, inputs: Inputs) -> Tensor:
        if self.experts is None:
            return inputs.stats["allow"]
        scores_NE = inputs.scores_NE
        # compilers and tensors without values get a mask of their own
        plain = type(scores_NE) is Tensor and not torch.compiler.is_compiling()
        return (_kept if plain else _mask)(self.experts, inputs.num_experts, scores_NE.device)


def _mask(experts: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
    chosen = set(experts)
    return torch.tensor([expert in chosen for expert in range(num_experts)], device=device)


# copied to the device once: a copy from the host cannot be part of a captured graph
_kept = lru_cache(maxsize=4096)(_mask)
