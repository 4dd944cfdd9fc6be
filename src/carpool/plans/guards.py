"""Guards: limits around a policy that compose. Each narrows what the policy may do to a group or a row."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import require
from carpool.routing.batch import Batch
from carpool.routing.spec import ALL_BITS


@dataclass(frozen=True)
class Guard:
    """Base of all guards; the hooks default to doing nothing and run in this order."""

    name: ClassVar[str]
    reads_depths: ClassVar[bool] = False  # whether it says how deep experts are read

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises CarpoolError if the parameters are impossible for a layer with `E` experts, `K` a token."""

    def batch(self, batch: Batch) -> Batch:
        """Change who the rows are, before the policy sees them."""
        return batch

    def coreset(self, policy: Policy, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Change the coresets, bool `[G, E]`."""
        return coreset_GE

    def allowed(self, policy: Policy, inputs: Inputs, allowed_NE: Tensor) -> Tensor:
        """Change what each row may use, bool `[N, E]`."""
        return allowed_NE

    def read_depth(self, inputs: Inputs, depth_GE: Tensor | None) -> Tensor | None:
        """Change how deep a group reads experts, int64 `[G, E]` (see `Policy.read_depth`)."""
        return depth_GE

    def __str__(self) -> str:
        shown = [repr(getattr(self, one.name)) for one in fields(self) if one.default is MISSING]
        shown += [
            f"{one.name}={value!r}"
            for one in fields(self)
            if (value := getattr(self, one.name)) != one.default and one.default is not MISSING
        ]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class DecodeOnly(Guard):
    """Prompt rows keep their native routing; what they read is free for the decoding rows beside them."""

    name = "decode_only"

    def batch(self, batch: Batch) -> Batch:
        return batch if batch.prefill_N is None else batch.exempting(batch.prefill_N)


@dataclass(frozen=True)
class MinBatch(Guard):
    """Groups with fewer than `voters` voters keep their native routing (there is little to share, and a policy
    that looks at one token alone harms it most). Left alone are token-local policies, which do not look at the batch,
    and those that save something for a single row, too (`depth`)."""

    voters: int

    name = "min_batch"

    def __post_init__(self) -> None:
        require(type(self.voters) is int and self.voters >= 1, f"min_batch({self.voters!r}): give a number of voters")

    def coreset(self, policy: Policy, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        return coreset_GE | self._few(policy, inputs)

    def allowed(self, policy: Policy, inputs: Inputs, allowed_NE: Tensor) -> Tensor:
        return allowed_NE | self._few(policy, inputs)[inputs.batch.group_N]

    def _few(self, policy: Policy, inputs: Inputs) -> Tensor:
        return (inputs.voters_G1 < self.voters) & (policy.kind == "group" and not policy.alone)


@dataclass(frozen=True)
class Protect(Guard):
    """A row that natively picks one of these experts keeps it."""

    experts: tuple[int, ...]

    name = "protect"

    def __post_init__(self) -> None:
        good = isinstance(self.experts, list | tuple) and all(type(e) is int and e >= 0 for e in self.experts)
        require(good and len(self.experts) > 0, f"protect({self.experts!r}): give a list of expert ids")
        object.__setattr__(self, "experts", tuple(self.experts))

    def check(self, num_experts: int, top_k: int) -> None:
        require(
            max(self.experts) < num_experts,
            f"protect: expert {max(self.experts)} of a layer with {num_experts} experts (0 to {num_experts - 1})",
        )

    def coreset(self, policy: Policy, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        return coreset_GE | (inputs.votes(inputs.native_NE) & self._mask(inputs))

    def allowed(self, policy: Policy, inputs: Inputs, allowed_NE: Tensor) -> Tensor:
        return allowed_NE | (inputs.native_NE & self._mask(inputs))

    def _mask(self, inputs: Inputs) -> Tensor:
        ids_E = torch.arange(inputs.num_experts, device=inputs.scores_NE.device)
        mask_E = torch.zeros_like(ids_E, dtype=torch.bool)
        for expert in self.experts:
            mask_E = mask_E | (ids_E == expert)
        return mask_E

    def __str__(self) -> str:
        return f"protect({list(self.experts)})"


@dataclass(frozen=True)
class ShortCircuit(Guard):
    """A group whose voters' natural union already fits the policy's budget keeps it as its coreset, so its voters
    keep their native routing: nothing would be saved. Does nothing for policies without a budget. (Our addition to
    the papers.)"""

    name = "short_circuit"

    def coreset(self, policy: Policy, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        limit = policy.limit(inputs.num_experts, inputs.top_k)
        if limit is None:
            return coreset_GE
        natural_GE = inputs.votes(inputs.native_NE)
        fits_G1 = (natural_GE & ~inputs.free_GE).sum(-1, keepdim=True) <= limit
        # in place of the policy's choice, not beside it: rows without a vote may not read more than the budget;
        # unless that allows every expert, when all rows are native anyway
        fits_G1 = fits_G1 & (inputs.voters_G1 > 0) & ~coreset_GE.all(-1, keepdim=True)
        return torch.where(fits_G1, natural_GE | inputs.free_GE, coreset_GE)


@dataclass(frozen=True)
class Bits(Guard):
    """Experts are read with at most so many bits of their weights (they are stored in planes, `carpool compress`). Rows
    that are exempt read all there is.

    Beside a policy that chooses experts this is sharing on quantised experts; with `topk` alone, plain quantisation.
    """

    depth: int

    name = "bits"
    reads_depths = True

    def __post_init__(self) -> None:
        good = type(self.depth) is int and 1 <= self.depth <= ALL_BITS
        require(good, f"bits({self.depth!r}): give the most bits that are read of a weight, 1 to {ALL_BITS}")

    def read_depth(self, inputs: Inputs, depth_GE: Tensor | None) -> Tensor | None:
        shape = (inputs.batch.num_groups, inputs.num_experts)
        if depth_GE is None:
            depth_GE = torch.full(shape, ALL_BITS, dtype=torch.int64, device=inputs.scores_NE.device)
        return depth_GE.clamp_max(self.depth)


@dataclass(frozen=True)
class Bound(Guard):
    """A guard that acts last and beats every budget: it gives single rows native experts back. In a plan the floor
    acts before `regret`, which keeps the floor's bound since it only adds."""

    def bound(
        self, policy: Policy, inputs: Inputs, allowed_NE: Tensor, depth_GE: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What each row may use, bool `[N, E]`, and how deep its group reads, with what the bound gives back."""
        raise NotImplementedError


@dataclass(frozen=True)
class Floor(Bound):
    """No row loses more than a share `tau` of its native weight: a row that would gets its own best native experts
    back until it does not. The floor beats every budget; what it adds is counted.

    A pair that is left to a surrogate is lost in full: what a surrogate explains is a mean over tokens, and this is a
    bound on each. `tau=0` gives every row its native routing, `tau=1` never acts.

    Where experts are read at depths, what is read with fewer than `depth` bits counts as lost, too (default: the most
    that the plan reads of any expert).
    """

    tau: float | Tensor
    depth: int | None = None

    name = "floor"

    def __post_init__(self) -> None:
        good = isinstance(self.tau, Tensor) or (type(self.tau) in (int, float) and 0 <= self.tau <= 1)
        require(good, f"floor({self.tau!r}): give the largest share of its weight a row may lose, 0 to 1")
        deep = self.depth is None or (type(self.depth) is int and 1 <= self.depth <= ALL_BITS)
        require(
            deep, f"floor(depth={self.depth!r}): give the bits below which a weight counts as lost, 1 to {ALL_BITS}"
        )

    def bound(
        self, policy: Policy, inputs: Inputs, allowed_NE: Tensor, depth_GE: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds the heaviest native experts that are displaced, or read too shallow, while more than `tau` would still
        be; a group reads as deep as the row that asks for most."""
        ids_NK = inputs.native_ids_NK.long()
        weights_NK = inputs.native_weight_NK
        kept_NE = allowed_NE
        if depth_GE is not None:
            least = torch.minimum(inputs.stats["deepest"], depth_GE.new_tensor(self.depth or ALL_BITS))
            kept_NE = allowed_NE & (Policy.by_row(inputs, depth_GE) >= least)
        missing_NK = weights_NK * ~kept_NE.gather(-1, ids_NK)
        heaviest = missing_NK.sort(dim=-1, descending=True, stable=True)
        # what is displaced if this expert and all lighter ones stay out
        left_NK = heaviest.values.flip(-1).cumsum(-1).flip(-1)
        total_N1 = weights_NK.sum(-1, keepdim=True)
        # `minimum`: the two sums may round differently, and tau=1 never acts; `<= 0`: a weight may be 0
        back_NK = (torch.minimum(left_NK, total_N1) > self.tau * total_N1) | (self.tau <= 0)
        added_NE = torch.zeros_like(allowed_NE).scatter(-1, ids_NK.gather(-1, heaviest.indices), back_NK)
        if depth_GE is not None:
            raised_GE = inputs.batch.group_any(added_NE & inputs.batch.real_N.unsqueeze(-1))
            depth_GE = torch.where(raised_GE, torch.maximum(depth_GE, least), depth_GE)
        return allowed_NE | added_NE, depth_GE


@dataclass(frozen=True)
class Regret(Bound):
    """A row moves only if it loses at most `tau` of routing probability: that of its native experts less that of those
    it gets, over all experts 1. A row that would lose more gets its own best native experts back until it does not.

    Meant for routing with few experts a row, whole models above all (`carpool.models`): with one expert a row, every
    `floor` below 1 forbids any move, while a row between two equals loses nothing by going to the other.

    What a policy puts in the place of an expert counts where that is the row's next best; where it is nothing, a
    similar expert or a surrogate, it does not. `tau=0` lets a row move between equals only, `tau=1` never acts.
    """

    tau: float | Tensor

    name = "regret"

    def __post_init__(self) -> None:
        good = isinstance(self.tau, Tensor) or (type(self.tau) in (int, float) and 0 <= self.tau <= 1)
        require(good, f"regret({self.tau!r}): give the most routing probability a row may lose, 0 to 1")

    def bound(
        self, policy: Policy, inputs: Inputs, allowed_NE: Tensor, depth_GE: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ids_NK, top_k = inputs.native_ids_NK.long(), inputs.top_k
        chance_NE = inputs.weights_NE.double()
        missing_NK = chance_NE.gather(-1, ids_NK) * ~allowed_NE.gather(-1, ids_NK)
        heaviest = missing_NK.sort(dim=-1, descending=True, stable=True)
        left_NK = heaviest.values.flip(-1).cumsum(-1).flip(-1)  # lost if this expert and all lighter ones stay out
        if type(policy).assign is Policy.assign:
            keys_NE = torch.where(allowed_NE & ~inputs.native_NE, inputs.preference_NE, -1)
            next_best = keys_NE.topk(top_k, dim=-1)
            gained_NK = (chance_NE.gather(-1, next_best.indices) * (next_best.values >= 0)).cumsum(-1)
            # with the j heaviest back, as many next best ones come in as then are still missing
            absent_N1 = (~allowed_NE.gather(-1, ids_NK)).sum(-1, keepdim=True)
            places_NK = absent_N1 - 1 - torch.arange(top_k, device=ids_NK.device)
            left_NK = left_NK - gained_NK.gather(-1, places_NK.clamp_min(0)) * (places_NK >= 0)
        total_N1 = chance_NE.sum(-1, keepdim=True)
        too_much_NK = torch.minimum(left_NK, total_N1) > self.tau * total_N1  # `minimum`: see `Floor`
        # back comes all up to the last place at which too much would be lost
        back_NK = (too_much_NK.int().flip(-1).cumsum(-1).flip(-1) > 0) & (heaviest.values > 0)
        added_NE = torch.zeros_like(allowed_NE).scatter(-1, ids_NK.gather(-1, heaviest.indices), back_NK)
        return allowed_NE | added_NE, depth_GE


GUARDS: dict[str, type[Guard]] = {
    guard.name: guard for guard in (DecodeOnly, MinBatch, Protect, ShortCircuit, Bits, Floor, Regret)
}
