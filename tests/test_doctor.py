"""`carpool doctor` on configurations of every kind; no weights anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig
from typer.testing import CliRunner

from carpool import known_shapes
from carpool.cli.commands import app
from carpool.doctor import built, diagnose
from carpool.errors import CarpoolError
from carpool.plans.grammar import parse

QWEN3_30B = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 1000, "dtype": "bfloat16",
}  # fmt: skip


def folder(tmp_path: Path, **config) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_geometry_of_qwen3_30b(tmp_path):
    found = diagnose(folder(tmp_path, **QWEN3_30B))
    assert (found.moe_layers, found.num_experts, found.top_k) == (48, 128, 8)
    assert found.expert_bytes == 3 * 2048 * 768 * 2
    assert found.expected_union(1) == pytest.approx(8)
    assert found.expected_union(16) == pytest.approx(82.4, abs=0.05)
    assert found.step_bytes(128) == pytest.approx(48 * 128 * found.expert_bytes)


def test_sparse_layers_are_counted(tmp_path):
    config = AutoConfig.for_model(
        "deepseek_v3", num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=4,
        n_group=4, topk_group=2, hidden_size=64, moe_intermediate_size=32, intermediate_size=64, vocab_size=100,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = diagnose(tmp_path)
    assert (found.moe_layers, found.layers) == (3, 4)
    assert (found.rule.num_groups, found.rule.kept_groups) == (4, 2)
    assert found.rule.bias


def test_quantised_weights(tmp_path):
    found = diagnose(folder(tmp_path, **QWEN3_30B, quantization_config={"quant_method": "fp8"}))
    assert found.expert_bytes == 3 * 2048 * 768
    assert "gives up the fused TensorRT-LLM FP8 routing kernel" in found.in_vllm["cuda"]


@pytest.mark.parametrize(
    ("family", "cpu", "gpu"),
    [
        ("qwen3_moe", "shared", "untested; routing in Python gives up"),
        ("ernie4_5_moe", "refused: vLLM's CPU build drops its correction bias", "untested"),
        ("gemma4_text", "refused: vLLM routes it by a function of the model's own", "refused"),
        ("mistral4", "not tried with this family", "untested"),
    ],
)
def test_what_becomes_of_it_in_vllm(tmp_path, family, cpu, gpu):
    tiny_config(family).save_pretrained(tmp_path)
    found = diagnose(tmp_path)
    assert found.in_vllm["cpu"].startswith(cpu)
    assert found.in_vllm["cuda"].startswith(gpu)


def test_what_is_known_about_vllm_is_what_was_measured():
    from carpool.hosts.vllm import known

    measured = json.loads((Path(__file__).parent.parent / "docs/results/vllm-coverage.json").read_text())["rows"]
    results: dict[str, set[str]] = {}
    for row in measured:
        if row["parallel"] == "one worker" and row["storage"] in ("bfloat16", "float32"):
            results.setdefault(row["family"], set()).add(row["result"])
    assert len(results) > 10
    for family, found in results.items():
        assert "failed" not in found
        assert ("shared" in found) == (family in known.SHARED), family
        if "refused" in found and family != "qwen3":  # which is dense
            assert family in known.REFUSED or family in known.REFUSED_ON_CPU, family


def test_what_is_known_about_sglang_is_what_was_measured():
    from carpool.hosts.sglang import known

    rows = json.loads((Path(__file__).parent.parent / "docs/results/sglang-coverage.json").read_text())["rows"]
    families: dict[str, set[str]] = {}
    for row in rows:
        families.setdefault(row["result"], set()).add(row["family"])
    assert families["shared"] == known.SHARED
    assert families.get("not run by SGLang", set()) == known.NOT_RUN
    assert families.get("refused", set()) - {"qwen3"} == set(known.REFUSED)  # which is dense
    assert "failed" not in families


def test_what_is_said_of_quantised_weights_is_what_was_measured(tmp_path):
    """By the table of formats: what vLLM did not run is not called shared."""
    from carpool.hosts.vllm import known

    measured = json.loads((Path(__file__).parent.parent / "docs/results/vllm-coverage.json").read_text())["rows"]
    methods = {row["method"]: row for row in measured if row.get("method")}
    assert set(methods) == known.WITHOUT_KERNEL
    for method, row in methods.items():
        said = known.on_cpu(row["family"], method)
        assert said.startswith("shared") == (row["result"] == "shared"), method
        assert ("stand-ins" in said) == (row["result"] == "routers only"), method
    quantised = {"deepseek_v3": "fp8", "gpt_oss": "mxfp4"}
    for family, method in quantised.items():
        config = tiny_config(family).to_dict() | {"quantization_config": {"quant_method": method}}
        found = diagnose(folder(tmp_path, **config))
        assert found.in_vllm["cpu"].startswith("not run where it was tried"), family
        assert method in found.in_vllm["cpu"]
    assert known.on_cpu("qwen3_moe", "exl3") == "not tried with weights in exl3"
    assert known.on_cpu("gemma4_text", "fp8").startswith("refused")


@pytest.mark.parametrize(
    ("policy", "gpu"),
    [
        ("xshare(budget=16)", "two launches"),
        ("surrogate(budget=16) | floor(0.3)", "two launches"),
        ("xshare_speculative(budget=16, request_budget=8)", "operation by operation: xshare_speculative needs more"),
    ],
)
def test_which_path_a_policy_takes(tmp_path, policy, gpu):
    model = folder(tmp_path, **QWEN3_30B)
    paths = diagnose(model).paths(policy)
    assert paths["cpu"] == "compiled graph"
    assert paths["cuda"].startswith(gpu)
    shown = CliRunner().invoke(app, ["doctor", str(model), "--policy", policy])
    assert shown.exit_code == 0, shown.output
    assert f"A layer's routing in vLLM under {policy}" in " ".join(shown.output.split())
    assert f"GPUs: {paths['cuda']}" in " ".join(shown.output.split())


def test_more_experts_than_the_kernels_take(tmp_path):
    found = diagnose(folder(tmp_path, **QWEN3_30B | {"num_experts": 1024}))
    assert found.paths("topk(k=2)")["cuda"].startswith("operation by operation: 1024 experts")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("xshare(budget=999)", "asks for 999 of 128 experts"),
        ("sharing(budget=8)", "unknown policy"),
        ("xshare_expert_parallel(budget_per_device=4)", "needs the device of each expert"),
        ("depth(bytes=0.2)", "this checkpoint holds them as whole weights"),
    ],
)
def test_a_policy_that_cannot_run_on_the_model(tmp_path, policy, says):
    shown = CliRunner().invoke(app, ["doctor", str(folder(tmp_path, **QWEN3_30B)), "--policy", policy])
    assert shown.exit_code == 2
    assert says in " ".join(shown.output.split())


def test_suggestions_fit_the_model(tmp_path):
    for top_k in (1, 2, 8):
        found = diagnose(folder(tmp_path, **QWEN3_30B | {"num_experts_per_tok": top_k}))
        for text, _ in found.suggestions():
            if "..." not in text:
                parse(text).check(found.num_experts, found.top_k)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}, "dense"),
        ({"model_type": "no_such_family"}, "cannot read a model configuration"),
        ({}, "cannot read a model configuration"),
    ],
)
def test_unsuitable_models_are_refused_in_one_sentence(tmp_path, config, says):
    with pytest.raises(CarpoolError) as refusal:
        diagnose(folder(tmp_path, **config))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(CarpoolError, match=r"holds no config\.json"):
        diagnose(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(CarpoolError, match="cannot read a model configuration"):
        diagnose(tmp_path)


def test_a_file_is_read_whatever_its_name(tmp_path):
    folder(tmp_path, **QWEN3_30B)
    small = tmp_path / "small.json"
    small.write_text(json.dumps({**QWEN3_30B, "num_experts": 16}))
    assert diagnose(small).num_experts == 16
    assert diagnose(tmp_path / "config.json").num_experts == 128
    other = {"qwen3_moe.json": "{}", "policy.json": '{"policy": "oea(k0=1)"}', "model.safetensors": "\0"}
    for name, content in other.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(CarpoolError, match="no JSON object with a model_type"):
            diagnose(tmp_path / name)


@pytest.mark.parametrize("family", ["cohere2_moe", "deepseek_v2", "gemma4_text", "mistral4", "qwen3_vl_moe_text"])
def test_families_from_their_configuration_alone(tmp_path, family):
    tiny_config(family).save_pretrained(tmp_path)
    found = diagnose(tmp_path)
    assert (found.moe_layers, found.layers, found.num_experts, found.top_k) == (2, 2, 8, 2)


def test_a_model_of_several_modalities(tmp_path):
    text = tiny_config("qwen3_vl_moe_text").to_dict()
    AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config={"depth": 1}).save_pretrained(tmp_path)
    assert (diagnose(tmp_path).moe_layers, diagnose(tmp_path).num_experts) == (2, 8)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nodir", "there is no folder or file 'nodir'; give a model's folder"),
        ("no/such/folder", "there is no folder or file 'no/such/folder'; give a model's folder"),
        ("no-such-organisation/model", "neither a folder nor a model in the local cache; fetch its configuration"),
    ],
)
def test_a_model_that_is_not_there(name, says):
    with pytest.raises(CarpoolError) as refusal:
        diagnose(name)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


PLAIN = {
    "qwen3_moe": [{}, {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}],
    "qwen2_moe": [{}, {"norm_topk_prob": True}],
    "mixtral": [{}], "olmoe": [{}, {"norm_topk_prob": True}], "granitemoe": [{}], "gpt_oss": [{}],
    "deepseek_v3": [{}, {"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "norm_topk_prob": False}],
    "glm4_moe": [{}, {"n_group": 1, "topk_group": 1}],
}  # fmt: skip
LEFT_OUT = ("norm_topk_prob", "routed_scaling_factor", "decoder_sparse_step", "mlp_only_layers", "dtype")


def test_all_plain_families_are_tried():
    assert set(PLAIN) == set(known_shapes.FAMILIES)


@pytest.mark.parametrize(("family", "changes"), [(family, one) for family, them in PLAIN.items() for one in them])
def test_what_is_read_is_what_transformers_builds(tmp_path, family, changes):
    """As saved, with numbers that the file leaves to the family's defaults, and quantised."""
    tiny_config(family, **changes).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    bare = {name: value for name, value in whole.items() if name not in LEFT_OUT}
    for content in (whole, whole | {"dtype": "bfloat16"}, bare):
        folder(tmp_path, **content)
        assert known_shapes.read(content) is not None
        assert diagnose(tmp_path) == built(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": None}, {"num_experts": 0}, {"num_experts": 6, "num_experts_per_tok": 8},
        {"decoder_sparse_step": 0}, {"mlp_only_layers": 3}, {"norm_topk_prob": "yes"}, {"hidden_size": 2.5},
        {"model_type": "brand_new"}, {"dtype": "auto"}, {"num_hidden_layers": True},
    ],
)  # fmt: skip
def test_what_is_odd_is_not_read_but_built(changes):
    assert known_shapes.read(QWEN3_30B) is not None
    assert known_shapes.read(QWEN3_30B | changes) is None
    deepseek = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "hidden_size": 8, "moe_intermediate_size": 8,
                "n_routed_experts": 16, "num_experts_per_tok": 4}  # fmt: skip
    assert known_shapes.read(deepseek) is not None
    for more in (
        {"n_group": 3},
        {"topk_group": 9},
        {"first_k_dense_replace": 4},
        {"n_group": 16},
        {"n_group": None},
        {"routed_scaling_factor": 1},
    ):
        assert known_shapes.read(deepseek | more) is None


def test_json_holds_what_the_table_shows(tmp_path):
    shown = CliRunner().invoke(app, ["doctor", str(folder(tmp_path, **QWEN3_30B)), "--json", "--bandwidth", "1000"])
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert (said["num_experts"], said["top_k"], said["moe_layers"]) == (128, 8, 48)
    assert said["routing"]["scoring"] == "softmax"
    step = next(one for one in said["steps"] if one["batch"] == 16)
    assert step["expected_union"] == pytest.approx(82.4, abs=0.05)
    assert step["ms_per_step"] == pytest.approx(step["bytes_per_step"] / 1e9)
    assert {"cpu", "cuda"} == set(said["vllm"])


def test_command_prints_the_estimate_and_labels_it(tmp_path):
    shown = CliRunner().invoke(app, ["doctor", str(folder(tmp_path, **QWEN3_30B)), "--bandwidth", "3350"])
    assert shown.exit_code == 0, shown.output
    assert "128 experts, 8 per token" in shown.output
    assert "82.4" in shown.output
    assert "upper estimate" in shown.output
    assert "(this machine): " in shown.output


def test_command_exits_with_an_error(tmp_path):
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path / "nothing")])
    assert shown.exit_code == 2
