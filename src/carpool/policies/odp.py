"""ODP, the second half of MC: a token skips experts that weigh little beside its heaviest, unless it is important."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.bit_plan import BitPlan
from carpool.policies.parameters import require
from carpool.policies.registry import register
from carpool.policies.skipping import front_of, skip
from carpool.routing.spec import Routing


@register
@dataclass(frozen=True)
class ODP(Policy):
    """Skip a token's experts whose weight, over that of its heaviest, is below what is usual for their rank; important
    tokens skip none.

    Based on MC (arXiv 2410.06270), its online dynamic pruning. With two experts a token: skip the second if its ratio
    to the first is below the median over a calibration text. Tokens whose importance is among the largest 2 % keep
    both.

    Parameters:
        quantile: of the ratios of a rank, up to which they are skipped; the paper's is the median.
        protect: share of tokens that skip nothing, those with the largest L1 norm of the router's input.
        bits: also give every expert MC's bit plan of so many mean bits (`bit_plan`), the paper's whole method.

    Reading of the paper: for more than two experts every rank has a median of its own. A token's importance is its L1
    norm times the attention that later tokens pay to it, among the tokens of a prompt. The released code adds attention
    over the wrong axis, which gives 1, so that the norm alone decides, and a decoded token, alone in its pass, is never
    protected: `protect=0`. What later tokens will pay is not known when a token is decoded, so `protect=0.02` goes by
    the norm, against its quantile over the calibration text. The paper prunes in some layers only; policy files do so.

    Statistics: `ratio_quantiles [K, 11]` and `l1_quantiles [101]` (`carpool calibrate --energy`, `carpool compress`);
    with `bits` also those of `bit_plan`.

    Identity: `quantile=0.0`.

    Example: `odp(quantile=0.5)`.
    """

    quantile: float = 0.5
    protect: float = 0.02
    bits: float | None = None

    name = "odp"
    paper = "MC, arXiv 2410.06270"
    kind = "token"
    needs_hidden = True

    def __post_init__(self) -> None:
        for name in ("quantile", "protect"):
            value = getattr(self, name)
            good = type(value) in (int, float) and 0 <= value <= 1
            require(good, f"{name}={value!r}: give a share, 0 to 1")
        self._plan()

    @property
    def reads_depths(self) -> bool:  # type: ignore[override]  # by instance: with bits alone
        return self.bits is not None

    def required_stats(self) -> tuple[str, ...]:
        plan = self._plan()
        return ("ratio_quantiles", "l1_quantiles", *(() if plan is None else plan.required_stats()))

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`ratio [K]`, below which a rank is skipped, in float64; `important []`, the norm from which none is; with
        `bits` what `bit_plan` prepares.

        Raises:
            CarpoolError: quantiles of unknown shapes, or bits that no plan has.
        """
        ratios_KQ, norms_Q = stats["ratio_quantiles"].double(), stats["l1_quantiles"].double()
        require(
            ratios_KQ.dim() == 2 and norms_Q.dim() == 1 and norms_Q.shape[0] > 1,
            f"odp: quantiles of shapes {list(ratios_KQ.shape)} and {list(norms_Q.shape)}; calibrate again",
        )
        ratio_K = between(ratios_KQ, self.quantile) if self.quantile > 0 else torch.zeros_like(ratios_KQ[:, 0])
        important = between(norms_Q, 1 - self.protect)
        important = important if self.protect > 0 else torch.full_like(important, torch.inf)
        plan = self._plan()
        return {"ratio": ratio_K, "important": important} | ({} if plan is None else plan.prepare(stats))

    def read_depth(self, inputs: Inputs) -> Tensor | None:
        """Int64 `[G, E]` with `bits`."""
        plan = self._plan()
        return None if plan is None else plan.read_depth(inputs)

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Bool `[N, E]`."""
        assert inputs.hidden_NH is not None
        front = front_of(inputs, inputs.native_weight_NK)
        first_N1 = front.weights_NK[:, :1].double()
        important_N1 = inputs.hidden_NH.double().abs().sum(-1, keepdim=True) >= inputs.stats["important"]
        return front.keeping(
            inputs, (front.weights_NK >= inputs.stats["ratio"][: inputs.top_k] * first_N1) | important_N1
        )

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        """What is kept, mixed by the model's rule."""
        return skip(inputs, allowed_NE, renormalize=True)

    def _plan(self) -> BitPlan | None:
        return None if self.bits is None else BitPlan(self.bits)


def between(quantiles_XQ: Tensor, share: float) -> Tensor:
    """The quantile of a share, from those of `Q` shares at equal distances from 0 to 1, linear between them."""
    place = share * (quantiles_XQ.shape[-1] - 1)
    low = min(int(place), quantiles_XQ.shape[-1] - 2)
    return torch.lerp(quantiles_XQ[..., low], quantiles_XQ[..., low + 1], place - low)
