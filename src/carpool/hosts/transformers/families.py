"""The families of models that Carpool knows, as data: one row a router class of transformers.

To add a family, read its router's forward, add a row here and a tiny configuration to `tests/tiny_models.py`, and run
`python benchmarks/families.py`; the conformance check at attach and the tests of every family do the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.offload import weight
from carpool.routing.spec import RouteSpec, Scoring

Read = str | Callable[[Any], Any]
"""Where a value is: the name of an attribute of the router, or a function of it."""


@dataclass(frozen=True)
class Rule:
    """How a router class routes.

    Attributes:
        family: model type in transformers.
        scoring, renormalize, renormalize_eps, group_score, score_in_logits_dtype: as in `RouteSpec`; text in
            `renormalize` and a function in `scoring` are read from the router.
        scaling: factor on the weights, or None.
        bias: correction bias `[E]` for the choice, or None; looked up on the block where the router has none.
        groups: number of expert groups and how many a token may use, or None; a value of None is no limit.
        per_expert_scale: factor on the weight by the expert's id, or None.
        arguments: attributes of the block that it hands to the router after the hidden states.
        unflattened: the router takes hidden states `[B, S, H]` only, not rows.
        only: name of the one block that is shared where several of a layer route the same way.
        part: name of the one part of the model that is shared where several have layers of the same numbers.
        num_experts, top_k: `E` and `K`.
        note: what its users should know.
    """

    family: str
    scoring: Scoring | Callable[[Any], Scoring] = "softmax"
    renormalize: bool | str = True
    renormalize_eps: float = 0.0
    scaling: Read | None = None
    bias: str | None = None
    groups: tuple[Read, Read] | None = None
    group_score: Literal["max", "top2"] = "top2"
    per_expert_scale: str | None = None
    score_in_logits_dtype: bool = False
    arguments: tuple[str, ...] = ()
    unflattened: bool = False
    only: str = ""
    part: str = ""
    num_experts: str = "num_experts"
    top_k: str = "top_k"
    note: str = ""

    def spec(self, router: nn.Module, block: nn.Module) -> RouteSpec:
        """The rule with the numbers of one router (its tensors are shared, not copied)."""
        groups = (1, 1) if self.groups is None else tuple(_read(where, router) or 1 for where in self.groups)
        scale = self.per_expert_scale
        return RouteSpec(
            top_k=_read(self.top_k, router),
            scoring=self.scoring(router) if callable(self.scoring) else self.scoring,
            renormalize=bool(
                self.renormalize if isinstance(self.renormalize, bool) else _read(self.renormalize, router)
            ),
            renormalize_eps=self.renormalize_eps,
            scaling=1.0 if self.scaling is None else float(_read(self.scaling, router)),
            bias_E=self._bias(router, block),
            num_groups=groups[0],
            kept_groups=groups[1],
            group_score=self.group_score,
            per_expert_scale_E=None if scale is None else _tensor(router, scale),
            score_in_logits_dtype=self.score_in_logits_dtype,
        )

    def experts(self, router: nn.Module) -> int:
        """`E` of one router."""
        return int(_read(self.num_experts, router))

    def _bias(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        if self.bias is None:
            return None
        owner = router if hasattr(router, self.bias.split(".")[0]) else block
        if not hasattr(owner, self.bias.split(".")[0]):
            return None  # switched off by the configuration; a renamed one fails the check at attach
        return _tensor(owner, self.bias).reshape(-1)


def _tensor(owner: nn.Module, name: str) -> Tensor:
    found = weight(owner, name)
    if found is None:
        kind = type(owner).__name__
        raise CarpoolError(f"{kind} has no tensor {name!r}; this version of transformers is not supported")
    return found.detach()


def _read(where: Read, router: nn.Module) -> Any:
    return attrgetter(where)(router) if isinstance(where, str) else where(router)


SOFTMAX = Rule("qwen3_moe", renormalize="norm_topk_prob")
RENORMALIZED = Rule("mixtral")
SELECTED = Rule("gpt_oss", scoring="softmax_after_topk")
GREEDY = Rule(  # or limited to groups, by the configuration
    "deepseek_v2",
    renormalize=False,
    scaling="routed_scaling_factor",
    groups=(lambda r: r.topk_method != "greedy" and r.num_group, lambda r: r.topk_method != "greedy" and r.topk_group),
    group_score="max",
)
SIGMOID = Rule("minimax_m3_vl", scoring="sigmoid", bias="e_score_correction_bias")
SIGMOID_GROUPS = replace(
    SIGMOID,
    family="deepseek_v3",
    renormalize="norm_topk_prob",
    renormalize_eps=1e-20,
    scaling="routed_scaling_factor",
    groups=("num_group", "topk_group"),
)
ERNIE = Rule("ernie4_5_moe", bias="moe_statics.e_score_correction_bias")
GEMMA = Rule(  # hands over probabilities where others hand over logits
    "gemma4",
    scoring="probabilities",
    per_expert_scale="per_expert_scale",
    num_experts="config.num_experts",
    top_k="config.top_k_experts",
)

RULES: dict[str, Rule] = {
    # softmax over all experts
    "Qwen3MoeTopKRouter": SOFTMAX,
    "Qwen2MoeTopKRouter": replace(SOFTMAX, family="qwen2_moe"),
    "OlmoeTopKRouter": replace(SOFTMAX, family="olmoe"),
    "FlexOlmoTopKRouter": replace(SOFTMAX, family="flex_olmo"),
    "MellumTopKRouter": replace(SOFTMAX, family="mellum"),
    "Qwen3NextTopKRouter": replace(SOFTMAX, family="qwen3_next"),
    "Qwen4ExpTextTopKRouter": replace(SOFTMAX, family="qwen4_exp"),
    "Qwen3OmniMoeThinkerTextTopKRouter": replace(SOFTMAX, family="qwen3_omni_moe", note="share `model.thinker`"),
    "Qwen3OmniMoeTalkerTextTopKRouter": replace(SOFTMAX, family="qwen3_omni_moe", note="share `model.talker`"),
    "MixtralTopKRouter": RENORMALIZED,
    "MiniMaxTopKRouter": replace(RENORMALIZED, family="minimax"),
    "Qwen3_5MoeTopKRouter": replace(RENORMALIZED, family="qwen3_5_moe"),
    "Qwen3VLMoeTextTopKRouter": replace(RENORMALIZED, family="qwen3_vl_moe"),
    "HunYuanMoEV1Gate": replace(RENORMALIZED, family="hunyuan_v1_moe"),
    "DeepseekV2TopkRouter": GREEDY,
    "DeepseekOcr2TextTopkRouter": replace(GREEDY, family="deepseek_ocr2"),
    "Mistral4TopkRouter": replace(
        SIGMOID_GROUPS, family="mistral4", scoring="softmax", bias=None, score_in_logits_dtype=True
    ),
    "Ernie4_5_MoeTopKRouter": ERNIE,
    "Ernie4_5_VLMoeMoeTopKRouter": replace(
        ERNIE, family="ernie4_5_vl_moe", only="text_moe", note="text alone: experts of image tokens are not shared"
    ),
    "LongcatFlashTopkRouter": Rule(
        "longcat_flash",
        renormalize=False,
        scaling="routed_scaling_factor",
        bias="e_score_correction_bias",
        num_experts="n_routed_experts",
        note="its identity experts count as experts, although reading them costs nothing",
    ),
    "Gemma4TextRouter": GEMMA,
    "DiffusionGemmaTextRouter": replace(
        GEMMA,
        family="diffusion_gemma",
        part="decoder",
        note="its denoising passes, a canvas a request; what its encoder reads, prompts and finished canvases, is not "
        "shared",
    ),
    # softmax over the selected logits
    "GptOssTopKRouter": SELECTED,
    "GraniteMoeTopKRouter": replace(SELECTED, family="granitemoe"),
    "GraniteMoeSharedTopKRouter": replace(SELECTED, family="granitemoeshared"),
    "GraniteMoeHybridTopKRouter": replace(SELECTED, family="granitemoehybrid"),
    "GraniteMoeSWATopKRouter": replace(SELECTED, family="granitemoe_swa"),
    "AriaTextTopKRouter": replace(SELECTED, family="aria"),
    "Cohere2MoeTopKRouter": Rule(
        "cohere2_moe",
        scoring=lambda router: "sigmoid" if router.expert_selection_fn == "sigmoid" else "softmax_after_topk",
        renormalize="norm_topk_prob",
    ),
    "OpenAIPrivacyFilterTopKRouter": replace(
        SELECTED, family="openai_privacy_filter", scaling=lambda router: 1 / router.top_k
    ),
    # sigmoid and a correction bias, limited to expert groups
    "DeepseekV3TopkRouter": SIGMOID_GROUPS,
    "DeepseekV32TopkRouter": replace(SIGMOID_GROUPS, family="deepseek_v32"),
    "Glm4MoeTopkRouter": replace(SIGMOID_GROUPS, family="glm4_moe"),
    "Glm4MoeLiteTopkRouter": replace(SIGMOID_GROUPS, family="glm4_moe_lite"),
    "Glm4vMoeTextTopkRouter": replace(SIGMOID_GROUPS, family="glm4v_moe"),
    "GlmMoeDsaTopkRouter": replace(SIGMOID_GROUPS, family="glm_moe_dsa"),
    "Glm5NextTextTopkRouter": replace(SIGMOID_GROUPS, family="glm5_next"),
    "Dots1TopkRouter": replace(SIGMOID_GROUPS, family="dots1"),
    "KimiLinearTopkRouter": replace(SIGMOID_GROUPS, family="kimi_linear"),
    "ExaoneMoeTopkRouter": replace(SIGMOID_GROUPS, family="exaone_moe"),
    "AXK1TopkRouter": replace(SIGMOID_GROUPS, family="axk1"),
    "AXK2TopkRouter": replace(SIGMOID_GROUPS, family="axk2"),
    "SolarOpenTopkRouter": replace(SIGMOID_GROUPS, family="solar_open"),
    "HYV4TopkRouter": replace(SIGMOID_GROUPS, family="hy_v4"),
    "MiMoV2FlashTopkRouter": replace(SIGMOID_GROUPS, family="mimo_v2_flash"),
    "NemotronHTopkRouter": replace(SIGMOID_GROUPS, family="nemotron_h"),
    # sigmoid and a correction bias, no groups
    "MiniMaxM3VLTopKRouter": SIGMOID,
    "DeepseekV4TopKRouter": replace(
        SIGMOID,
        family="deepseek_v4",
        scoring="sqrtsoftplus",
        renormalize_eps=1e-20,
        scaling="routed_scaling_factor",
        score_in_logits_dtype=True,
        note="only without hash-routed layers, so not as published",
    ),
    "Step3p7TopKRouter": replace(SIGMOID, family="step3p7"),
    "LagunaTopKRouter": replace(SIGMOID, family="laguna"),
    "MiniMaxM2TopKRouter": replace(SIGMOID, family="minimax_m2", arguments=("e_score_correction_bias",)),
    "HYV3TopKRouter": replace(
        SIGMOID,
        family="hy_v3",
        renormalize_eps=1e-20,
        scaling="router_scaling_factor",
        arguments=("e_score_correction_bias",),
    ),
    "AfmoeTokenChoiceRouter": replace(
        SIGMOID,
        family="afmoe",
        renormalize_eps=1e-20,
        scaling="route_scale",
        bias="expert_bias",
        arguments=("expert_bias",),
        unflattened=True,
    ),
    "Lfm2MoeTopKRouter": replace(
        SIGMOID,
        family="lfm2_moe",
        renormalize="norm_topk_prob",
        renormalize_eps=1e-6,
        scaling="routed_scaling_factor",
        bias="expert_bias",
        arguments=("expert_bias",),
        score_in_logits_dtype=True,
    ),
}


def known_families() -> list[str]:
    """Model types that the host shares."""
    return sorted({rule.family for rule in RULES.values()})


def rule_of(router: nn.Module, where: str) -> Rule:
    """The rule of a router's class.

    Raises:
        CarpoolError: the class is unknown; the message names it and the module.
    """
    for kind in type(router).__mro__:
        if kind.__name__ in RULES:
            return RULES[kind.__name__]
    if type(router).__module__.split(".")[0] == "peft":
        raise CarpoolError(
            f"{where} has an adapter on its router ({type(router).__name__}), so that it routes otherwise than its "
            "class; merge it with merge_and_unload(), or adapt other modules"
        )
    if isinstance(router, nn.Linear):
        raise CarpoolError(
            f"{where} routes inside its own forward ({type(router).__name__} gives no more than logits), where Carpool "
            "has no seam; use the model's class in transformers instead of code that came with the weights"
        )
    raise CarpoolError(
        f"{where} is a {type(router).__name__}, a router Carpool does not know; use a model of a family in "
        "docs/families.md, or add a rule for this router to carpool/hosts/transformers/families.py"
    )
