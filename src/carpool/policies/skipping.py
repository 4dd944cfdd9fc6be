"""Skipping: every token keeps the front of its own sorted native experts. Saves pairs; union hardly.

Three published rules for where the front ends. All look at one token alone, keep at least one expert, and shorten
the native top-K in the order of its weights (stable, so a tie keeps the host's order).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy, drop
from carpool.policies.parameters import require
from carpool.policies.registry import register
from carpool.routing.exact import to_fixed
from carpool.routing.spec import Routing


@dataclass(frozen=True)
class Front:
    """A row's native experts by descending weight, as exact fixed-point numbers.

    Attributes:
        ids_NK: int64.
        weights_NK: int64 fixed point, descending.
        before_NK: int64, the weight of all native experts in front of this one.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    before_NK: Tensor

    @property
    def total_N1(self) -> Tensor:
        """Weight of all native experts of a row, float64 (exact)."""
        return (self.before_NK[:, -1:] + self.weights_NK[:, -1:]).double()

    def keeping(self, inputs: Inputs, kept_NK: Tensor) -> Tensor:
        """The kept experts and always the heaviest one, bool `[N, E]`."""
        kept_NK = kept_NK | (self.before_NK == 0)
        return torch.zeros_like(inputs.native_NE).scatter(-1, self.ids_NK, kept_NK)


def front_of(inputs: Inputs, weight_NK: Tensor) -> Front:
    """The native experts in the order of their weights."""
    ids_NK = inputs.native_ids_NK.long()
    sorted_NK = weight_NK.sort(dim=-1, descending=True, stable=True)
    fixed_NK = to_fixed(sorted_NK.values)
    return Front(ids_NK.gather(-1, sorted_NK.indices), fixed_NK, fixed_NK.cumsum(-1) - fixed_NK)


def skip(inputs: Inputs, allowed_NE: Tensor, renormalize: bool) -> Routing:
    """The allowed native experts. With `renormalize` they are mixed by the model's own rule (a model that does not
    renormalise keeps the weights as they are); without it they keep their native weights, and what was skipped
    is missing from the sum."""
    if renormalize:
        return drop(inputs, allowed_NE)
    ids_NK = inputs.native_ids_NK.long()
    kept_NK = allowed_NE.gather(-1, ids_NK)
    weights_NK = inputs.spec.mix(inputs.weights_NE, ids_NK, torch.ones_like(kept_NK)) * kept_NK
    order_NK = kept_NK.int().argsort(dim=-1, descending=True, stable=True)  # what is kept in front
    ids_NK = torch.where(kept_NK, ids_NK, -1).gather(-1, order_NK)
    return Routing(torch.where(ids_NK >= 0, ids_NK, ids_NK[:, :1]).int(), weights_NK.gather(-1, order_NK))


def _check_share(name: str, value: float | Tensor) -> None:
    good = isinstance(value, Tensor) or (type(value) in (int, float) and 0 <= value <= 1)
    require(good, f"{name}={value!r}: give a share, 0 to 1")


@register
@dataclass(frozen=True)
class TopP(Policy):
    """Keep the fewest best experts whose probabilities sum to more than `p`; never more than the native `K`.

    Based on dynamic routing ("Harder Tasks Need More Experts", arXiv 2403.07652), applied to a model that was
    trained with a fixed `K`: an expert is kept if those in front of it sum to `p` or less.

    Parameters:
        p: share of the row's total score over all experts, 0 to 1. The paper trains with 0.4; on a model with many
            fine-grained experts the native `K` may hold less than that, and nothing is skipped.
        renormalize: mix what is kept by the model's rule instead of with its native weights.

    Reading of the paper: probabilities are over all experts; where scores do not sum to one (sigmoid routers) they
    are divided by their sum. A factor by expert that a model puts on the weight later (Gemma) is none of them. The
    paper mixes with raw probabilities, hence no renormalisation by default.

    Identity: `p=1.0`.

    Example: `top_p(p=0.35)`.
    """

    p: float | Tensor
    renormalize: bool = False

    name = "top_p"
    paper = "Dynamic routing, arXiv 2403.07652"
    kind = "token"

    def __post_init__(self) -> None:
        _check_share("p", self.p)

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Bool `[N, E]`."""
        front = front_of(inputs, inputs.weights_NE.gather(-1, inputs.native_ids_NK.long()))
        total_N1 = to_fixed(inputs.weights_NE).sum(-1, keepdim=True).double()
        return front.keeping(inputs, front.before_NK <= self.p * total_N1)

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        return skip(inputs, allowed_NE, self.renormalize)


@register
@dataclass(frozen=True)
class TailMass(Policy):
    """Skip the lightest native experts while together they hold less than a share `beta` of the row's weight.

    The skipping rule of NAEE ("Not All Experts are Equal", arXiv 2402.14800) for any `K`.

    Parameters:
        beta: share of the weight of the native top-K, 0 to 1; a row skips less than this.
        renormalize: mix what is kept by the model's rule (the paper) instead of with its native weights.

    Reading of the paper: it has `K = 2` and skips the second expert if its weight is below `b` times the first's,
    `b` the median of that ratio in a layer; this is `beta = b / (1 + b)`, set per layer in a policy file.

    Identity: `beta=0`.

    Example: `tail_mass(beta=0.3)`.
    """

    beta: float | Tensor
    renormalize: bool = True

    name = "tail_mass"
    paper = "NAEE, arXiv 2402.14800"
    kind = "token"

    def __post_init__(self) -> None:
        _check_share("beta", self.beta)

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Bool `[N, E]`."""
        front = front_of(inputs, inputs.native_weight_NK)
        tail_NK = front.total_N1 - front.before_NK
        return front.keeping(inputs, tail_NK >= self.beta * front.total_N1)

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        return skip(inputs, allowed_NE, self.renormalize)


@register
@dataclass(frozen=True)
class LayerThreshold(Policy):
    """Skip the experts whose weight, times how much their layer matters, is below a threshold for the whole model.

    Based on MoDES (arXiv 2511.15690), for text.

    Parameters:
        tau: threshold on `sensitivity * weight`, 0 or more. Its scale depends on the number of layers and on `K`,
            so it belongs to one model and one calibration; find it from a target with `carpool.calibrate.thresholds`.
        renormalize: mix what is kept by the model's rule instead of with its native weights (the paper).

    Statistics: `sensitivity` (0-d), the layer's share of all layers' sensitivity: the mean KL divergence of the next
    token when the layer's experts are left out.

    Reading of the paper: the weight is the expert's share of the row's native top-K, whether or not the model
    renormalises; a row keeps its heaviest expert (the released code may leave it none).

    Identity: `tau=0`.

    Example: `layer_threshold(tau=0.02)`.
    """

    tau: float | Tensor
    renormalize: bool = False

    name = "layer_threshold"
    paper = "MoDES, arXiv 2511.15690"
    kind = "token"
    needs = ("sensitivity",)

    def __post_init__(self) -> None:
        good = isinstance(self.tau, Tensor) or (type(self.tau) in (int, float) and self.tau >= 0)
        require(good, f"tau={self.tau!r}: give a threshold of 0 or more")

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`sensitivity` as a 0-d float64."""
        sensitivity = stats["sensitivity"].double()
        require(sensitivity.dim() == 0, f"layer_threshold: sensitivity of shape {list(sensitivity.shape)}; expected []")
        return {"sensitivity": sensitivity}

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Bool `[N, E]`."""
        front = front_of(inputs, inputs.native_weight_NK)
        value_NK = inputs.stats["sensitivity"] * front.weights_NK
        return front.keeping(inputs, value_NK >= self.tau * front.total_N1)

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        return skip(inputs, allowed_NE, self.renormalize)
