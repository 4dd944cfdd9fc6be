"""What the plugin does with a model in the installed vLLM: shares its experts, refuses it, or vLLM does not run it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm_models as tiny
from family_matrix import describe
from vllm_stand_ins import stood_in

from carpool import CarpoolError

DTYPES = ("bfloat16", "float32")
FULL = "xshare(budget=1.0)"
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 128}  # blocks of 128, as number formats have
# gates and attention as they are: formats are about experts, and attention has kernels of its own
LINEAR = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    "mlp.gate", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
)]  # fmt: skip


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    given = {"symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": given | weights}
    if inputs is not None:
        group["input_activations"] = given | weights | {"dynamic": True} | inputs
    ignored = ["lm_head", *LINEAR]
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ignored, "config_groups": {"group_0": group},
    }  # fmt: skip


FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
STORED = {  # what checkpoints hold: family, sizes, configuration of the weights
    "int8, compressed-tensors": ("qwen3_moe", _compressed(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, {"strategy": "token"}
    )),
    "int4, compressed-tensors": ("qwen3_moe", _compressed(
        "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    )),
    "fp8, compressed-tensors": ("qwen3_moe", _compressed(
        "float-quantized", FP8, {"strategy": "group", "group_size": 128, "block_structure": None}
    )),
    "fp8": ("qwen3_moe", {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": LINEAR,
    }),
    "int4, GPTQ": ("qwen3_moe", {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
        "dynamic": {"-:.*self_attn.*": {}, "-:.*mlp.gate$": {}},
    }),
    "int4, AWQ": ("qwen3_moe", {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["self_attn", "mlp.gate"],
    }),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}),
}  # fmt: skip
ON_LOAD = ("fp8_per_block", "mxfp4", "int8_per_channel_weight_only")  # vLLM quantises by itself
ROUTERS = "routers only"  # shared, with stand-ins for experts that vLLM has no kernel for
ROUNDED = "shared; native to rounding"  # a compiler fuses stock's router into its neighbours, and rounds otherwise


@dataclass(frozen=True)
class Case:
    """A model and a way to run it.

    Attributes:
        family: a key of `vllm_models.FAMILIES`. storage: of the weights. parallel: over what it is spread.
        config: changes of the configuration, without weights where they are quantised. options: of the engine.
    """

    family: str
    storage: str = "float32"
    parallel: str = "one worker"
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What no two cases share."""
        return self.family, self.storage, self.parallel

    @property
    def method(self) -> str | None:
        """How the model's configuration calls the quantisation of its weights."""
        name: str | None = self.config.get("quantization_config", {}).get("quant_method")
        return name


def cases() -> list[Case]:
    """Every family in every number format, the number formats of quantised weights, and ways to spread a model."""
    made = [Case(name, options={"dtype": dtype}, storage=dtype) for dtype in DTYPES for name in tiny.FAMILIES]
    made.append(Case("qwen3_moe", "float16", options={"dtype": "float16"}))
    for name in ON_LOAD:
        made.append(Case("qwen3_moe", name, config=WIDE, options={"dtype": "bfloat16", "quantization": name}))
    for name, (family, given) in STORED.items():
        sizes = WIDE if family == "qwen3_moe" else {"hidden_size": 256, "intermediate_size": 128}
        options = {"dtype": "bfloat16", "load_format": "dummy"}
        made.append(Case(family, name, config=sizes | {"quantization_config": given}, options=options))
    backend = {"model_impl": "transformers"}
    made.append(Case("qwen3_moe", parallel="one worker, Transformers backend", options=backend))
    made.append(Case("qwen3_moe", parallel="one worker, torch.compile", options={"enforce_eager": False}))
    expert = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    made.append(Case("qwen3_moe", parallel="two workers, expert parallel", options=expert))
    for name in ("qwen3_moe", "deepseek_v3"):
        options = {"tensor_parallel_size": 2, "dtype": _spread(name)}
        made.append(Case(name, _spread(name), "two workers, tensor parallel", options=options))
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    made.append(Case("qwen3_moe", parallel="two workers, pipeline parallel", options=options))
    return made


def _spread(name: str) -> str:
    return "bfloat16" if name.startswith("deepseek") else "float32"


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case beside the same engine without the key `carpool`.

    Args:
        case: what to run.
        folder: where its model is written, unless one is there.

    Returns:
        The case, its `result` (shared, shared but for rounding, refused, failed or not run by vLLM) and what that was
        seen from.
    """
    row: dict[str, Any] = {"family": case.family, "storage": case.storage, "parallel": case.parallel}
    row |= {} if case.method is None else {"method": case.method}
    if not (folder / "config.json").exists():
        _write(case, folder)
    native, without = None, ""
    try:
        native = tiny.generate(tiny.engine(folder, None, **case.options), tiny.prompts(6))
    except Exception as error:  # whatever it is, it is not about sharing
        without = _first(error)
    if native is None and case.method is not None:
        with stood_in() as reached:
            native = tiny.generate(tiny.engine(folder, None, **case.options), tiny.prompts(6))
            found = _beside(native, case, folder, reached)
        result = ROUTERS if found["result"] == "shared" and found["reached"] == found["union"] else "failed"
        return row | found | {"result": result, "says": without if result == ROUTERS else found.get("says", without)}
    return row | _beside(native, case, folder, without=without)


def _beside(
    native: Any, case: Case, folder: Path, reached: list[torch.Tensor] | None = None, without: str = ""
) -> dict[str, Any]:
    """The plugin beside an engine without it.

    Args:
        native: what that gave; None if it did not run, and `without` says why.
        reached: to which the experts' stand-ins add the ids of their calls.
    """
    row: dict[str, Any] = {}
    given = tiny.prompts(6)
    try:
        # whatever is known of its family: what its layers say
        llm = tiny.engine(folder, tiny.SHARING | {"allow_untested_engine": True}, **case.options)
    except CarpoolError as error:
        return {"result": "refused", "says": _first(error), "without": without or "runs"}
    except Exception as error:
        return {"result": "not run by vLLM" if without else "failed", "says": without or _first(error)}
    if native is None:
        return {"result": "not run by vLLM", "says": without}
    shared = tiny.generate(llm, given)
    found = llm.collective_rpc("carpool_report")
    layers = [layer for rank in found for layer in rank["layers"]]
    row |= {
        name: sum(layer[name] for layer in layers) for name in ("steps", "rows_changed", "union", "natural_union")
    }  # fmt: skip
    if reached is not None:  # prompts came before the steps that are counted
        row["reached"] = sum(len(ids.unique()) for ids in reached[-row["steps"] :])
    row["within_budget"] = all(layer["union"] <= layer["steps"] * tiny.BUDGET for layer in layers)
    row["tokens_differ"] = [ids for ids, _ in shared] != [ids for ids, _ in native]
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    off = tiny.generate(llm, given)
    llm.collective_rpc("carpool_set", kwargs={"enabled": True, "policy": FULL})
    full = tiny.generate(llm, given)
    row["off_identical"], row["all_experts_identical"] = off == native, full == native
    kept = row["rows_changed"] > 0 and row["within_budget"]
    if hasattr(llm.llm_engine.model_executor, "driver_worker"):  # in this process
        row["router"] = describe(tiny.host(llm).layers[0].spec)
    if kept and off == full == native:
        return row | {"result": "shared"}
    return row | {"result": ROUNDED if kept and _rounded(off, native) and _rounded(full, native) else "failed"}


def _rounded(found: list[tuple[list[int], list[float]]], native: list[tuple[list[int], list[float]]]) -> bool:
    """Whether tokens are the same, and log-probabilities but for rounding in 32 bits."""
    pairs = [pair for one, other in zip(found, native, strict=True) for pair in zip(one[1], other[1], strict=True)]
    return [ids for ids, _ in found] == [ids for ids, _ in native] and all(abs(a - b) < 1e-5 for a, b in pairs)


def _first(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())[:300]


def _write(case: Case, folder: Path) -> None:
    if "quantization_config" not in case.config:
        tiny.write_model(case.family, folder, **case.config)
        return
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm.model_executor.model_loader import dummy_loader

    plain = {name: value for name, value in case.config.items() if name != "quantization_config"}
    config = AutoConfig.for_model(case.family, **(tiny.SIZES | tiny.FAMILIES[case.family] | plain))
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | case.config
    (folder / "config.json").write_text(json.dumps(written))
    dummy_loader.initialize_single_dummy_weight = _random


def _random(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
    """Weights of a usual size, and whole numbers of every kind."""
    tensor = tensor.detach()
    generator = torch.Generator().manual_seed(tensor.numel())
    if not tensor.is_floating_point():
        low, high = (-128, 128) if tensor.dtype == torch.int8 else (0, 1 << 30)
        tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator))
    elif tensor.dim() == 1:  # norms, biases
        tensor.fill_(1.0)
    else:
        std = 1.0 if tensor.shape[:1] == (tiny.VOCABULARY,) else 0.05  # tokens that differ in spite of biases
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
