"""What sharing experts could do for a model, from its configuration alone: no weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.artefacts.checkpoint import METHOD
from carpool.artefacts.json_text import read_json
from carpool.artefacts.model_source import HUB_NAME, configuration
from carpool.errors import CarpoolError
from carpool.known_shapes import RoutingRule, Shape, read

if TYPE_CHECKING:
    from carpool.plans.grammar import Plan
    from carpool.routing.spec import RouteSpec

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# vLLM's fused kernels that route by themselves: what each kind of weights would use, and loses under a policy
FUSED_ROUTING = {
    "none": "the fused TensorRT-LLM bf16 routing kernel on Blackwell, elsewhere none",
    "fp8": "the fused TensorRT-LLM FP8 routing kernel, where the GPU has one",
    "modelopt": "the fused TensorRT-LLM FP8 or NVFP4 routing kernel, where the GPU has one",
    "compressed-tensors": "the fused TensorRT-LLM routing kernel of its number format, where the GPU has one",
    METHOD: "nothing, for experts in planes have Carpool's kernels alone",
    "mxfp4": "the monolithic Triton or TensorRT-LLM MXFP4 kernel for a modular one",
}
BITS_UNKNOWN = 8
BITS = {"fp8": 8, "mxfp4": 4.25, "awq": 4.5, "gptq": 4.5}


@dataclass(frozen=True)
class Diagnosis:
    """What a configuration says.

    Attributes:
        family: model type. architecture: class name.
        moe_layers, layers: how many of the model's layers are MoE.
        num_experts, top_k: `E` and `K` of the first MoE layer. rule: its routing rule.
        expert_bytes: bytes of one expert of one layer. weights: how they are stored. in_planes: whether experts
            can be read at depths (`carpool compress --output`).
        in_vllm: what becomes of the model in vLLM, by device: `cpu` and `cuda`. in_sglang: and in SGLang.
    """

    family: str
    architecture: str
    moe_layers: int
    layers: int
    num_experts: int
    top_k: int
    rule: RoutingRule
    expert_bytes: float
    weights: str
    in_planes: bool
    in_vllm: dict[str, str]
    in_sglang: str

    @property
    def spec(self) -> RouteSpec:
        """The rule with no tensors in it: no correction bias, no scales."""
        from carpool.routing.spec import RouteSpec

        rule = self.rule
        return RouteSpec(
            rule.top_k, rule.scoring, rule.renormalize, scaling=rule.scaling, num_groups=rule.num_groups,
            kept_groups=rule.kept_groups,
        )  # fmt: skip

    def expected_union(self, batch: int) -> float:
        """Distinct experts per layer and step if every token drew `K` of `E` independently and evenly:
        `E (1 - (1 - K/E)^B)`. Real tokens agree more, so this is an upper estimate."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** batch)

    def step_bytes(self, union: float) -> float:
        """Bytes of expert weights read per decoding step at a mean union."""
        return union * self.expert_bytes * self.moe_layers

    def suggestions(self) -> list[tuple[str, str]]:
        """Policies with settings to begin with, and what each needs."""
        half = math.ceil(self.num_experts / 2)
        k0 = max(1, self.top_k // 4)
        found = [(f"xshare(budget={half}) | floor(0.3)", "nothing")]
        if self.top_k > 1:
            found.append((f"oea(k0={max(1, self.top_k // 2)})", "nothing"))
            found.append((f"sere(top={k0}, threshold=0.3)", "statistics from `carpool calibrate`"))
        else:
            found.append(("oea(k0=...), sere(top=...), topk(k=...)", "more than one expert per token: none fits"))
        found.append((f"surrogate(budget={half})", "statistics from `carpool calibrate --surrogates 16`"))
        found.append((f"des_vote(size={max(half, self.top_k)})", 'group="request" or "block:n" for diffusion models'))
        return found

    def paths(self, policy: str) -> dict[str, str]:
        """How vLLM runs a layer's routing under a policy, by device: `cpu` and, with Triton, `cuda`.

        Raises:
            CarpoolError: a text that is no policy, or one that cannot run on this model.
        """
        import torch

        from carpool.hosts.engine.fitting import check_plan
        from carpool.hosts.engine.fused import path_on
        from carpool.plans.grammar import parse

        plan = parse(policy).for_serving()
        plan.check(self.num_experts, self.top_k)
        check_plan(plan, self.in_planes)
        _rehearse(plan, self)
        size = self.num_experts, self.top_k
        return {name: path_on(torch.device(name), plan, *size, triton=True) for name in self.in_vllm}


def _rehearse(plan: Plan, found: Diagnosis) -> None:
    """Raises CarpoolError if a policy needs to know of rows what an engine does not say."""
    import torch

    from carpool.plans.pipeline import route
    from carpool.routing.batch import Batch
    from carpool.routing.spec import RouteSpec

    if plan.policy.required_stats():  # which come from a calibration
        return
    batch = Batch.of(1, request_N=torch.zeros(1, dtype=torch.int64), num_requests=1)
    route(plan, RouteSpec(top_k=found.top_k), torch.zeros(1, found.num_experts), batch)


def diagnose(model: str | Path) -> Diagnosis:
    """Read a model's configuration.

    Args:
        model: a folder with a `config.json`, that file itself, or a model name that is in the local cache.

    Raises:
        CarpoolError: nothing there, no JSON, a dense model, or a family whose routers Carpool does not know.
    """
    content = configuration(model)
    shape = read(content)
    if shape is None:
        return built(model)
    return _diagnosis(shape, content["model_type"], content["model_type"], content.get("quantization_config"))


def built(model: str | Path) -> Diagnosis:
    """The same from a model without weights that transformers builds: for every family, and seconds slower."""
    from carpool.hosts.transformers import find_layers

    config = config_of(model)
    shell = shell_of(config, model)
    layers = find_layers(shell)
    first, text = layers[0], config.get_text_config()
    dtype = getattr(config, "dtype", None)
    shape = Shape(
        type(shell).__name__, text.num_hidden_layers, len(layers), first.num_experts, RoutingRule.of(first.spec),
        sum(parameter.numel() for parameter in first.experts.parameters()) // first.num_experts,
        16 if dtype is None else dtype.itemsize * 8,
    )  # fmt: skip
    return _diagnosis(shape, config.model_type, text.model_type, getattr(config, "quantization_config", None))


def shell_of(config: Any, model: str | Path) -> Any:
    """The model without weights.

    Args:
        model: where the configuration is from, for the message.

    Raises:
        CarpoolError: transformers builds none from it.
    """
    import torch

    from carpool.hosts.transformers.loading import auto_class

    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CarpoolError(f"transformers cannot build a language model from {model}: {reason}") from None


def _diagnosis(shape: Shape, family: str, text_family: str, quantization: Any) -> Diagnosis:
    from carpool.hosts.sglang.known import in_sglang
    from carpool.hosts.vllm.known import on_cpu, on_gpu

    method, bits = "none", shape.bits
    if quantization is not None:
        given = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = str(given.get("quant_method", "unknown"))
        bits = _planes(given) if method == METHOD else float(given.get("bits") or BITS.get(method, BITS_UNKNOWN))
    weights = f"{bits:g} bits ({method})" if method != "none" else f"{bits:g} bits"
    if method == METHOD:
        *others, deepest = map(str, given.get("depths") or ("?",))
        weights = f"{bits:g} bits in planes, which can be read {', '.join(others)} or {deepest} deep"
    return Diagnosis(
        family=family,
        architecture=shape.architecture,
        moe_layers=shape.moe_layers,
        layers=shape.layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        rule=shape.rule,
        expert_bytes=shape.expert_numbers * bits / 8,
        weights=weights,
        in_planes=method == METHOD,
        in_vllm={
            "cpu": on_cpu(text_family, method),
            "cuda": on_gpu(text_family, FUSED_ROUTING.get(method, f"nobody knows what ({method!r} weights)")),
        },
        in_sglang=in_sglang(text_family, method),
    )


def _planes(given: dict[str, Any]) -> float:
    """Bits of a weight that is read as deep as it is stored, with its share of a scale."""
    depths, group = given.get("depths") or [BITS_UNKNOWN], given.get("group_size") or 0
    return float(depths[-1]) + (16 / float(group) if group else 0.0)


def config_of(model: str | Path) -> Any:
    """Transformers' configuration of a model; raises what `diagnose` raises for what cannot be read."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    cached = not path.exists()
    if cached and not HUB_NAME.fullmatch(str(model)):
        raise CarpoolError(
            f"there is no folder or file {str(model)!r}; give a model's folder, its config.json, or the name "
            "organisation/model of a model in the local cache"
        )
    file = path / "config.json" if path.is_dir() else path
    if not cached:
        _require_configuration(file)
    try:
        return AutoConfig.from_pretrained(str(model) if cached else str(file), local_files_only=True)
    except (OSError, ValueError) as error:
        if cached and isinstance(error, OSError):
            raise CarpoolError(
                f"{str(model)!r} is neither a folder nor a model in the local cache; fetch its configuration with "
                f"`hf download {model} config.json`"
            ) from None
        reason = str(error).splitlines()[0][:160]
        raise CarpoolError(f"cannot read a model configuration from {str(model)!r}: {reason}") from None


def _require_configuration(file: Path) -> None:
    """Transformers guesses a family from a path when the file does not name one."""
    if not file.is_file():
        raise CarpoolError(f"{file.parent} holds no config.json; give a model's folder or its configuration")
    try:
        content = read_json(file, any_number=True)
    except CarpoolError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CarpoolError(
            f"cannot read a model configuration from {str(file)!r}: it is no JSON object with a model_type; give a "
            "model's folder or its config.json"
        )
