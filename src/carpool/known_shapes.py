"""The MoE layers of a model, read from its configuration alone: without torch, for families whose rules are simple.

`carpool doctor` starts with this. What is not plain here (another family, a number that is missing or odd) it builds
without weights instead, which takes seconds; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carpool.routing.spec import RouteSpec, Scoring

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class RoutingRule:
    """How the first MoE layer routes, as far as a configuration says: the fields of `RouteSpec`, without tensors.

    Attributes:
        bias: whether a correction bias is added for the choice.
    """

    top_k: int
    scoring: Scoring
    renormalize: bool
    scaling: float = 1.0
    bias: bool = False
    num_groups: int = 1
    kept_groups: int = 1

    @classmethod
    def of(cls, spec: RouteSpec) -> RoutingRule:
        """Of a model that was built."""
        return cls(
            spec.top_k, spec.scoring, spec.renormalize or spec.scoring == "softmax_after_topk", spec.scaling,
            spec.bias_E is not None, spec.num_groups, spec.kept_groups,
        )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a configuration says of a model.

    Attributes:
        architecture: name of the class. layers, moe_layers: how many there are.
        num_experts, top_k: `E` and `K`. rule: how they are chosen.
        expert_numbers: weights of one expert. bits: of a number as it is stored, without quantisation.
    """

    architecture: str
    layers: int
    moe_layers: int
    num_experts: int
    rule: RoutingRule
    expert_numbers: int
    bits: float

    @property
    def top_k(self) -> int:
        return self.rule.top_k


@dataclass(frozen=True)
class _Family:
    """Keys and defaults of a model type.

    Attributes:
        experts: keys that may hold `E`. width: key of an expert's intermediate size.
        scoring, renormalize: the rule; a key for `renormalize` is read, False where it is missing.
        dense: default of `first_k_dense_replace`; None where the family has no such key.
        grouped: sigmoid scores with a correction bias, limited to expert groups; defaults of `n_group`, `topk_group`,
            `routed_scaling_factor` and `norm_topk_prob`.
        biased: the experts' projections have biases.
    """

    architecture: str
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    scoring: Scoring = "softmax"
    renormalize: bool | str = "norm_topk_prob"
    dense: int | None = None
    grouped: tuple[int, int, float, bool] | None = None
    biased: bool = False


ROUTED = ("n_routed_experts",)
FAMILIES = {
    "qwen3_moe": _Family("Qwen3MoeForCausalLM"),
    "qwen2_moe": _Family("Qwen2MoeForCausalLM"),
    "mixtral": _Family("MixtralForCausalLM", width="intermediate_size", renormalize=True),
    "olmoe": _Family("OlmoeForCausalLM", width="intermediate_size"),
    "granitemoe": _Family(
        "GraniteMoeForCausalLM", width="intermediate_size", scoring="softmax_after_topk", renormalize=True
    ),
    "gpt_oss": _Family(
        "GptOssForCausalLM", width="intermediate_size", scoring="softmax_after_topk", renormalize=True, biased=True
    ),
    "deepseek_v3": _Family("DeepseekV3ForCausalLM", ROUTED, scoring="sigmoid", dense=3, grouped=(8, 4, 2.5, True)),
    "glm4_moe": _Family("Glm4MoeForCausalLM", ROUTED, scoring="sigmoid", dense=1, grouped=(1, 1, 1.0, True)),
}
SPARSE = ("qwen3_moe", "qwen2_moe")  # every `decoder_sparse_step`th layer, but for `mlp_only_layers`


def read(config: Mapping[str, Any]) -> Shape | None:
    """The shape of a configuration (`config.json` as an object); None where it has to be built."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return None
    experts = next((config[key] for key in family.experts if key in config), None)
    wanted = ("num_hidden_layers", "num_experts_per_tok", "hidden_size", family.width)
    numbers: list[Any] = [experts, *map(config.get, wanted)]
    if not all(type(number) is int and number > 0 for number in numbers):
        return None
    E, layers, K, H, I = numbers  # noqa: E741
    rule = _rule(family, config, K)
    moe_layers = _moe_layers(family, config, layers)
    dtype = config.get("dtype", config.get("torch_dtype"))
    if rule is None or not moe_layers or not _fits(rule, E) or (dtype is not None and dtype not in BITS):
        return None
    size = 3 * H * I + (2 * I + H if family.biased else 0)
    return Shape(family.architecture, layers, moe_layers, E, rule, size, BITS.get(dtype or "", 16))


def _rule(family: _Family, config: Mapping[str, Any], top_k: int) -> RoutingRule | None:
    if family.grouped is None:
        renormalize = family.renormalize
        if isinstance(renormalize, str):
            renormalize = config.get(renormalize, False)
        return RoutingRule(top_k, family.scoring, renormalize) if isinstance(renormalize, bool) else None
    keys = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
    groups, kept, scaling, renormalize = (
        config.get(key, default) for key, default in zip(keys, family.grouped, strict=True)
    )
    plain = type(groups) is int and type(kept) is int and type(scaling) is float
    if not plain or not isinstance(renormalize, bool):
        return None
    return RoutingRule(top_k, family.scoring, renormalize, scaling, True, groups, kept)


def _moe_layers(family: _Family, config: Mapping[str, Any], layers: int) -> int:
    """How many of the layers are MoE; 0 where the configuration is odd, or says none."""
    if family.dense is not None:
        dense = config.get("first_k_dense_replace", family.dense)
        return max(layers - dense, 0) if type(dense) is int and dense >= 0 else 0
    if config.get("model_type") not in SPARSE:
        return layers
    step, dense_ones = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if type(step) is not int or step < 1 or not isinstance(dense_ones, list):
        return 0
    return sum(place not in dense_ones and (place + 1) % step == 0 for place in range(layers))


def _fits(rule: RoutingRule, experts: int) -> bool:
    """Whether a model could route like this; what could not is left to the sentences of those who build it."""
    groups, kept = rule.num_groups, rule.kept_groups
    if not (1 <= rule.top_k <= experts <= 512 and 1 <= kept <= groups) or experts % groups:
        return False
    size = experts // groups
    return kept * size >= rule.top_k and (kept == groups or size >= 2)
