"""XShare for speculative decoding: first a set for each request, then one for the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import Number, require, require_count, require_within, resolve_budget
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class XShareSpeculative(Policy):
    """A small set of experts for each request's draft tokens; the union of these sets, brought to the batch's budget.

    Based on XShare (arXiv 2602.07265), section on speculative decoding: the tokens that one request verifies in a
    step prefer similar experts, so a few per request serve all of them.

    Parameters:
        budget: size of the batch's coreset; an int counts experts, a float in (0, 1] is a share of `E`.
        request_budget: size of a request's set, in the same units.
        warmup: each voter's best `warmup` experts are always kept, in the request's set and in the coreset.
        merge: `topup` keeps the whole union of the requests' sets and adds experts by the batch's gating mass, so
            the coreset holds `max(budget, union)`; with `budget=1` the requests alone decide. `prune` takes the
            experts of largest mass out of that union, so the coreset holds at most `max(budget, warm-up union)`.

    Needs: `Batch.request_N`, the request of each row. Engines say it; `carpool evaluate` does not.

    The verification step then samples from a changed model: acceptance is exact with respect to that one, not to the
    original.

    Reading of the paper: sources leave open which of the two merges is meant, hence both.

    Identity: `budget=E`, with `prune` also `request_budget=E`.

    Example: `xshare_speculative(budget=0.5, request_budget=0.25)`.
    """

    budget: int | float | Tensor
    request_budget: int | float | Tensor
    warmup: int | Tensor = 1
    merge: Literal["topup", "prune"] = "topup"

    name = "xshare_speculative"
    paper = "XShare, arXiv 2602.07265"

    def __post_init__(self) -> None:
        require(self.merge in ("topup", "prune"), f"merge={self.merge!r}: use 'topup' or 'prune'")
        require_count("warmup", self.warmup, 0)

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)
        resolve_budget("request_budget", self.request_budget, num_experts)
        require_within("warmup", self.warmup, top_k)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        batch = inputs.batch
        if batch.request_N is None:
            raise CarpoolError(
                "xshare_speculative needs the request of each row, which this run does not say; use xshare(budget=...)"
            )
        warm_NE = inputs.rank_NE < self.warmup
        request_size = resolve_budget("request_budget", self.request_budget, inputs.num_experts)
        size = resolve_budget("budget", self.budget, inputs.num_experts)

        # one set per request and group (R of them), so that no group sees another's rows
        by_request, group_R = batch.by_request()
        free_RE = inputs.free_GE[group_R].expand(by_request.num_groups, -1)
        requests = replace(inputs, batch=by_request, also_free_GE=free_RE)
        mass_RE = requests.utility(inputs.weights_NE)
        set_RE = requests.top_by_utility(mass_RE, request_size, requests.votes(warm_NE))

        mass_GE = inputs.utility(inputs.weights_NE)
        union_GE = inputs.votes(set_RE[by_request.group_N])
        if self.merge == "topup":
            return inputs.top_by_utility(mass_GE, size, union_GE)
        # an expert outside the union has no mass to offer; it may still fill the set, hence the mask
        return inputs.top_by_utility(mass_GE * union_GE, size, inputs.votes(warm_NE)) & union_GE
