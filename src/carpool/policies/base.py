"""What a policy is: a pure function from the scores of a batch to the experts it may use.

Shapes: `N` rows, `E` experts, `K` experts per token, `G` groups, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from carpool.policies.parameters import Number
from carpool.routing.batch import Batch
from carpool.routing.exact import rank_descending, to_fixed
from carpool.routing.keys import BLOCK, preference_keys, utility_keys
from carpool.routing.lazy import lazy_property
from carpool.routing.spec import RouteSpec, Routing, mask_of


@dataclass(frozen=True, eq=False)
class Inputs:
    """All that a policy may look at.

    Attributes:
        spec: the model's routing rule.
        scores_NE: what the router ranks by; finite.
        weights_NE: what it mixes by, over all experts, before renormalisation.
        native_ids_NK: the host's own choice.
        batch: groups, voters, exempt rows.
        stats: this layer's statistics, by name.
        hidden_NH: the router's input, for policies that ask for it.
        also_free_GE: free experts that a group has from the group around it, for policies that split groups.
    """

    spec: RouteSpec
    scores_NE: Tensor
    weights_NE: Tensor
    native_ids_NK: Tensor
    batch: Batch
    stats: Mapping[str, Tensor]
    hidden_NH: Tensor | None = None
    also_free_GE: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.scores_NE.shape[-1]

    @property
    def top_k(self) -> int:
        return self.native_ids_NK.shape[-1]

    @lazy_property
    def experts_E(self) -> Tensor:
        return torch.arange(self.num_experts, device=self.scores_NE.device)

    @lazy_property
    def native_NE(self) -> Tensor:
        """Mask of each row's native experts."""
        return mask_of(self.native_ids_NK, self.num_experts)

    @lazy_property
    def preference_NE(self) -> Tensor:
        """Each row's order of preference as int64 keys (`routing.keys.preference_keys`)."""
        kept_NE = self.spec.in_kept_groups(self.scores_NE)
        return preference_keys(self.scores_NE, kept_NE, self.native_ids_NK.long())

    @lazy_property
    def rank_NE(self) -> Tensor:
        """Each row's rank of its native experts by preference, 0 first; `K` for all others, which nobody compares."""
        ids_NK = self.native_ids_NK.long()
        keys_NK = self.preference_NE.gather(-1, ids_NK)
        # K is small: counting beats sorting, and a compiler fuses it
        rank_NK = (keys_NK.unsqueeze(-2) > keys_NK.unsqueeze(-1)).sum(-1)
        return torch.full_like(keys_NK[:, :1], self.top_k).expand(self.scores_NE.shape).scatter(-1, ids_NK, rank_NK)

    @lazy_property
    def voter_N1(self) -> Tensor:
        return self.batch.voter_N.unsqueeze(-1)

    @lazy_property
    def voters_G1(self) -> Tensor:
        """Number of voters of each group, `[G, 1]`."""
        return self.batch.group_sum(self.voter_N1.to(torch.int64))

    @lazy_property
    def native_weight_NK(self) -> Tensor:
        """Weight of each row's native experts up to the row's common factor, float64."""
        ids_NK, scale_E = self.native_ids_NK.long(), self.spec.per_expert_scale_E
        weight_NK = self.weights_NE.gather(-1, ids_NK).double()
        return weight_NK if scale_E is None else weight_NK * scale_E[ids_NK]  # exact: two floats in a double

    @lazy_property
    def native_weight_NE(self) -> Tensor:
        """The same by expert, float32, 0 elsewhere."""
        return torch.zeros_like(self.weights_NE).scatter(-1, self.native_ids_NK.long(), self.native_weight_NK.float())

    @lazy_property
    def native_share_NE(self) -> Tensor:
        """Share of each row's native weight by expert, float64, 0 elsewhere."""
        weight_NE = self.native_weight_NE
        return weight_NE / weight_NE.sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1e-30)

    @lazy_property
    def free_GE(self) -> Tensor:
        """Experts that exempt rows of the group read anyway, and those that the batch says are free: they cost nothing.
        Those of other groups do not count, or a request in a group of its own would depend on whose prompt runs beside
        it."""
        exempt_N1 = (self.batch.exempt_N & self.batch.real_N).unsqueeze(-1)
        free_GE = self.batch.group_any(self.native_NE & exempt_N1)
        for more in (self.also_free_GE, self.batch.free_E):
            free_GE = free_GE if more is None else free_GE | more
        return free_GE

    def votes(self, mask_NE: Tensor) -> Tensor:
        """Experts for which any voter of the group has the mask set, `[G, E]`."""
        return self.batch.group_any(mask_NE & self.voter_N1)

    def utility(self, values_NE: Tensor) -> Tensor:
        """Exact column sums of non-negative values over the voters of each group, `[G, E]` int64 fixed point."""
        return self.batch.group_sum(to_fixed(values_NE) * self.voter_N1)

    def peak(self, values_NE: Tensor) -> Tensor:
        """Largest of non-negative values over the voters of each group, `[G, E]` int64 fixed point, as `utility`."""
        return self.batch.group_max(to_fixed(values_NE) * self.voter_N1)

    def top_by_utility(self, utility_GE: Tensor, size: Number, start_GE: Tensor | None = None) -> Tensor:
        """The coreset `[G, E]` that starts from `start_GE` and takes the experts of largest utility until it
        holds `size` experts; free experts are not counted (they join every coreset later)."""
        chosen_GE = self.utility_rank(utility_GE, start_GE) < size
        return chosen_GE if start_GE is None else chosen_GE | start_GE

    def utility_rank(self, utility_GE: Tensor, start_GE: Tensor | None = None) -> Tensor:
        """Rank of each expert in its group, 0 first: `start_GE`, then the rest, then what is free; each by utility."""
        costly_GE = ~self.free_GE
        tier_GE = costly_GE.to(torch.int64)
        if start_GE is not None:
            tier_GE = tier_GE + (start_GE & costly_GE)
        return rank_descending(utility_keys(utility_GE, tier_GE), self.experts_E)


@dataclass(frozen=True)
class Policy:
    """One published method. Subclass it, implement `coreset` (most methods) or `allowed`/`assign`, and
    register it under the name the text form uses. Instances hold numbers only, never tensors of a model."""

    name: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[Literal["token", "group"]] = "group"
    needs: ClassVar[tuple[str, ...]] = ()
    needs_hidden: ClassVar[bool] = False  # whether `Inputs.hidden_NH` must be given
    alone: ClassVar[bool] = False  # whether it saves something in a group of one row, too
    reads_depths: ClassVar[bool] = False  # whether it says how deep experts are read, see `read_depth`

    @property
    def surrogates(self) -> bool:
        """Whether its routings leave pairs to surrogates, whose output the host has to add."""
        return False

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises CarpoolError if the parameters are impossible for a layer with `E` experts, `K` a token."""

    def limit(self, num_experts: int, top_k: int) -> Number | None:
        """The largest coreset that the budget asks for (None: the method has no budget); for `short_circuit`."""
        return None

    def required_stats(self) -> tuple[str, ...]:
        """Names of the per-layer statistics that `Inputs.stats` must hold."""
        return self.needs

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Inputs.stats` shall hold for a layer, derived once from the statistics file's tensors."""
        return {name: stats[name] for name in self.required_stats()}

    def coreset(self, inputs: Inputs) -> Tensor:
        """The experts a group may use, bool `[G, E]`; default: those that it reads, or all of them."""
        depth_GE = self.read_depth(inputs)
        if depth_GE is not None:
            return depth_GE > 0
        shape = (inputs.batch.num_groups, inputs.num_experts)
        return torch.ones(shape, dtype=torch.bool, device=inputs.scores_NE.device)

    def read_depth(self, inputs: Inputs) -> Tensor | None:
        """Bits of each expert's weights that a group reads, int64 `[G, E]`: an offered depth, `ALL_BITS`, or 0 for
        experts that are not in the coreset; None: all bits of every expert."""
        return None

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """The experts a row may use, bool `[N, E]`; default: its group's coreset."""
        return self.by_row(inputs, coreset_GE)

    def expected_loss(self, inputs: Inputs) -> Tensor | None:
        """Share of a displaced pair's weight that calibration expects to be lost, `[E]` in [0, 1]; None: all of it.
        Less than 1 where a surrogate takes the pair over. A mean over tokens, which bounds no row."""
        return None

    @staticmethod
    def by_row(inputs: Inputs, values_GE: Tensor) -> Tensor:
        """A group's values for each of its rows, `[N, E]`."""
        return values_GE.expand(inputs.scores_NE.shape) if values_GE.shape[0] == 1 else values_GE[inputs.batch.group_N]

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        """Experts and weights of every row; default: the model's own rule inside the allowed set (backfill)."""
        return backfill(inputs, allowed_NE)

    def __str__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{self.name}({', '.join(shown)})"


def backfill(inputs: Inputs, allowed_NE: Tensor) -> Routing:
    """The best `K` allowed experts of every row in its order of preference, mixed by the model's rule."""
    return _take(inputs, allowed_NE, inputs.top_k)


def drop(inputs: Inputs, allowed_NE: Tensor) -> Routing:
    """The row's native experts that are allowed, nothing in place of the others (but never no expert at all)."""
    kept_NE = allowed_NE & inputs.native_NE
    none_N1 = ~kept_NE.any(-1, keepdim=True)
    allowed_keys_NE = torch.where(allowed_NE, inputs.preference_NE, -1)
    best_NE = inputs.preference_NE == allowed_keys_NE.amax(-1, keepdim=True)
    return _take(inputs, kept_NE | (best_NE & none_N1), inputs.top_k)


def leave(inputs: Inputs, allowed_NE: Tensor, left_NE: Tensor) -> Routing:
    """Backfill over what is allowed and what is `left` to surrogates, mixed by the model's rule over both: a row whose
    displaced experts are all left keeps the weights that its router gave."""
    both = _take(inputs, allowed_NE | left_NE, inputs.top_k)
    own_NK = allowed_NE.gather(-1, both.ids_NK.long())
    # a row without any computed expert reads the best that it may, with weight 0
    best_N1 = torch.where(allowed_NE, inputs.preference_NE, -1).argmax(-1, keepdim=True)
    own_weights_NK = both.weights_NK * own_NK
    ids_NK = torch.where(own_NK, both.ids_NK, best_N1)  # `route` makes them int32 again
    return Routing(ids_NK, own_weights_NK, both.ids_NK, both.weights_NK - own_weights_NK)


def _take(inputs: Inputs, allowed_NE: Tensor, count: int) -> Routing:
    order_NE = torch.where(allowed_NE, inputs.preference_NE, inputs.preference_NE - BLOCK)
    first = order_NE.topk(count, dim=-1, sorted=True)
    kept_NK = first.values >= 0
    ids_NK = torch.where(kept_NK, first.indices, first.indices[:, :1])
    return Routing(ids_NK.int(), inputs.spec.mix(inputs.weights_NE, ids_NK, kept_NK))


def merge_duplicates(ids_NK: Tensor, weights_NK: Tensor) -> Routing:
    """Each id once per row: its first slot gets the sum of the weights, later slots the row's first id and 0."""
    same_NKK = ids_NK.unsqueeze(-1) == ids_NK.unsqueeze(-2)
    first_NK = ~same_NKK.tril(-1).any(-1)
    merged_NK = (same_NKK * weights_NK.unsqueeze(-2)).sum(-1).to(weights_NK.dtype) * first_NK
    return Routing(torch.where(first_NK, ids_NK, ids_NK[:, :1]).int(), merged_NK)
