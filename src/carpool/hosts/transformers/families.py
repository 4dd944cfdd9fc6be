"""The families of models that Carpool knows, as data: one row a router class of transformers.

To add a family, read its router's forward, add a row here and a tiny configuration to `tests/tiny_models.py`; the
conformance check at attach and the tests of every family do the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.routing import RouteSpec, Scoring


@dataclass(frozen=True)
class Rule:
    """How a router class routes; text values name an attribute of the router that holds the value.

    Attributes:
        family: model type in transformers.
        scoring, renormalize, renormalize_eps, group_score: as in `RouteSpec`.
        scaling: factor on the weights, or None.
        bias: correction bias `[E]` for the choice, or None; looked up on the block where the router has none.
        groups: number of expert groups and how many a token may use, or None.
        arguments: attributes of the block that it hands to the router after the hidden states.
        num_experts, top_k: `E` and `K`.
    """

    family: str
    scoring: Scoring = "softmax"
    renormalize: bool | str = True
    renormalize_eps: float = 0.0
    scaling: str | None = None
    bias: str | None = None
    groups: tuple[str, str] | None = None
    group_score: Literal["max", "top2"] = "top2"
    arguments: tuple[str, ...] = ()
    num_experts: str = "num_experts"
    top_k: str = "top_k"

    def spec(self, router: nn.Module, block: nn.Module) -> RouteSpec:
        """The rule with the numbers of one router (its tensors are shared, not copied)."""
        read = attrgetter
        renormalize = read(self.renormalize)(router) if isinstance(self.renormalize, str) else self.renormalize
        groups = (1, 1) if self.groups is None else tuple(read(name)(router) or 1 for name in self.groups)
        return RouteSpec(
            top_k=read(self.top_k)(router),
            scoring=self.scoring,
            renormalize=bool(renormalize),
            renormalize_eps=self.renormalize_eps,
            scaling=1.0 if self.scaling is None else float(read(self.scaling)(router)),
            bias_E=self._bias(router, block),
            num_groups=groups[0],
            kept_groups=groups[1],
            group_score=self.group_score,
        )

    def _bias(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        if self.bias is None:
            return None
        owner = router if hasattr(router, self.bias.split(".")[0]) else block
        return attrgetter(self.bias)(owner).detach().reshape(-1)


SIGMOID_GROUPS = Rule(
    "deepseek_v3",
    scoring="sigmoid",
    renormalize="norm_topk_prob",
    renormalize_eps=1e-20,
    scaling="routed_scaling_factor",
    bias="e_score_correction_bias",
    groups=("num_group", "topk_group"),
)

RULES: dict[str, Rule] = {
    # softmax over all experts
    "Qwen3MoeTopKRouter": Rule("qwen3_moe", renormalize="norm_topk_prob"),
    "Qwen2MoeTopKRouter": Rule("qwen2_moe", renormalize="norm_topk_prob"),
    "OlmoeTopKRouter": Rule("olmoe", renormalize="norm_topk_prob"),
    "FlexOlmoTopKRouter": Rule("flex_olmo", renormalize="norm_topk_prob"),
    "MixtralTopKRouter": Rule("mixtral"),
    # softmax over the selected logits
    "GptOssTopKRouter": Rule("gpt_oss", scoring="softmax_after_topk"),
    "GraniteMoeTopKRouter": Rule("granitemoe", scoring="softmax_after_topk"),
    # sigmoid and a correction bias, with and without groups
    "DeepseekV3TopkRouter": SIGMOID_GROUPS,
    "Glm4MoeTopkRouter": replace(SIGMOID_GROUPS, family="glm4_moe"),
    "MiniMaxM2TopKRouter": Rule(
        "minimax_m2", scoring="sigmoid", bias="e_score_correction_bias", arguments=("e_score_correction_bias",)
    ),
}


def rule_of(router: nn.Module, where: str) -> Rule:
    """The rule of a router's class.

    Raises:
        CarpoolError: the class is unknown; the message names it, the module and the known families.
    """
    for kind in type(router).__mro__:
        if kind.__name__ in RULES:
            return RULES[kind.__name__]
    known = ", ".join(sorted({rule.family for rule in RULES.values()}))
    raise CarpoolError(f"{where} is a {type(router).__name__}, a router Carpool does not know; it knows: {known}")
