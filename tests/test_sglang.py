"""The plugin in a real SGLang, on a CPU: `make test-sglang`. One engine for all, as starting one takes a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_models as tiny
import torch
import vllm_models
import vllm_statistics

from carpool.plans.grammar import parse

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24]]
COUNT = 12
POLICY = {"policy": vllm_models.POLICY, "isolation": "batch"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_models.write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Any]:
    engine = tiny.engine(model, POLICY)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return vllm_models.write_model("qwen3_moe", tmp_path_factory.mktemp("other"), seed=7)


@pytest.fixture
def shared(running: Any) -> Any:
    """The engine as it was when it started, with counters from zero."""
    running.flush_cache()
    running.collective_rpc("carpool_set", policy=vllm_models.POLICY, group="batch", enabled=True)
    running.collective_rpc("carpool_report", reset=True)
    return running


@pytest.fixture(scope="module")
def native(model: Path) -> tiny.Tokens:
    """What transformers chooses, as a stock SGLang does."""
    return in_transformers(model)


def in_transformers(model: Path) -> tiny.Tokens:
    loaded = vllm_statistics.load(model)
    made = []
    for prompt in PROMPTS:
        tokens = loaded.generate(torch.tensor([prompt]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        made.append(tokens[0, len(prompt) :].tolist())
    return made


def test_it_shares_and_says_so(shared: Any, native: tiny.Tokens) -> None:
    tokens = tiny.greedy(shared, PROMPTS, COUNT)
    found = tiny.report(shared)
    assert tokens != native
    assert [len(one) for one in tokens] == [COUNT] * len(PROMPTS)
    assert found["policy"].startswith(vllm_models.POLICY)
    assert (found["moe_layers"], found["num_experts"], found["top_k"]) == (2, [32], [4])
    for layer in found["layers"]:
        assert layer["calls"] == COUNT - 1, "every decoding step, and no prompt"
        assert layer["rows_changed"] > 0
        assert layer["union"] <= vllm_models.BUDGET * layer["calls"] < layer["natural_union"]


def test_off_is_stock(shared: Any, native: tiny.Tokens) -> None:
    shared.collective_rpc("carpool_set", enabled=False)
    assert tiny.greedy(shared, PROMPTS, COUNT) == native
    assert tiny.report(shared)["steps"]["passes"] == 0
    shared.collective_rpc("carpool_set", enabled=True, policy="xshare(budget=32)")
    assert tiny.greedy(shared, PROMPTS, COUNT) == native
    assert all(layer["rows_changed"] == 0 for layer in tiny.report(shared)["layers"])


def test_requests_that_opt_out_and_lone_ones_are_native(shared: Any, native: tiny.Tokens) -> None:
    assert tiny.greedy(shared, PROMPTS, COUNT, custom_params={"carpool": "off"}) == native
    assert tiny.greedy(shared, PROMPTS[:1], COUNT) == native[:1]
    shared.collective_rpc("carpool_set", group="request")
    assert tiny.greedy(shared, PROMPTS, COUNT) == native
    steps = tiny.report(shared)["steps"]
    assert steps["passes_exempt"] > 0
    assert steps["passes_alone"] > 0


def test_samples_of_one_prompt_share(shared: Any, native: tiny.Tokens) -> None:
    """Without a word about tenants or batches: siblings are known by who asked for them."""
    shared.collective_rpc("carpool_set", group="prompt")
    given = {"temperature": 0, "max_new_tokens": COUNT, "ignore_eos": True}
    shared.generate(input_ids=PROMPTS, sampling_params=given)
    assert all(layer["rows_changed"] == 0 for layer in tiny.report(shared)["layers"])
    shared.generate(
        input_ids=PROMPTS[0],
        sampling_params=given | {"n": 3, "temperature": 2.0, "custom_params": {"_carpool_samples": 1}},
    )
    assert all(layer["rows_changed"] > 0 for layer in tiny.report(shared)["layers"])


def test_the_radix_cache_shares_only_what_no_policy_touched(shared: Any, native: tiny.Tokens) -> None:
    tokens = tiny.greedy(shared, PROMPTS, COUNT)
    longer = [prompt + made for prompt, made in zip(PROMPTS, tokens, strict=True)]
    shared.collective_rpc("carpool_set", enabled=False)
    given = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    found = shared.generate(input_ids=longer, sampling_params=given)
    cached = [one["meta_info"]["cached_tokens"] for one in found]
    assert [0 < count <= len(prompt) for count, prompt in zip(cached, PROMPTS, strict=True)] == [True] * 3
    shared.flush_cache()
    again = shared.generate(input_ids=longer, sampling_params=given)
    assert [one["output_ids"] for one in again] == [one["output_ids"] for one in found]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "xshare(budget=99)"}, "99 of 32 experts"),
        ({"policy": "nothing(1)"}, "nothing"),
        ({"group": "everybody"}, "use one of request, prompt, tenant, batch"),
        ({"policy": "sere(top=1)"}, "needs the statistics 'similarity_frobenius'"),
        ({"policy": "surrogate(budget=8)"}, "needs the statistics"),
    ],
)
def test_changes_that_do_not_fit_change_nothing(shared: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):  # SGLang's kind
        shared.collective_rpc("carpool_set", **given)
    assert tiny.report(shared)["policy"].startswith(vllm_models.POLICY)


def test_a_request_that_says_nothing_understood_is_refused(shared: Any) -> None:
    with pytest.raises(ValueError, match="a request says \"carpool\": 'of'"):
        tiny.greedy(shared, PROMPTS, 2, custom_params={"carpool": "of"})


def policy_file(model: Path, folder: Path) -> Path:
    """SERE with a similarity measured on a model, more of it in one layer, and bound to that model."""
    from carpool.calibrate import calibrate
    from carpool.hosts.transformers import find_layers
    from carpool.plans.policy_file import PolicyFile

    loaded = vllm_statistics.load(model)
    ids_BT = torch.randint(0, vllm_models.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(3))
    statistics = calibrate(loaded, find_layers(loaded), ids_BT)
    statistics.save(folder / "stats.safetensors")
    made_for = {"fingerprint": statistics.fingerprint, "num_layers": 2, "num_experts": 32, "top_k": 4}
    plan = parse("sere(top=2, threshold=0.0)")
    PolicyFile(plan, {1: {"top": 1}}, made_for, folder / "stats.safetensors").save(folder / "policy.json")
    return folder / "policy.json"


def test_policy_files(shared: Any, model: Path, other: Path, native: tiny.Tokens, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "others").mkdir()
    mine, others = policy_file(model, tmp_path / "mine"), policy_file(other, tmp_path / "others")
    with pytest.raises(AssertionError, match="is of another model"):
        shared.collective_rpc("carpool_set", file=str(others))
    shared.collective_rpc("carpool_set", file=str(mine))
    found = tiny.report(shared)
    assert (found["policy"], found["statistics"]) == ("set per layer", str(tmp_path / "mine/stats.safetensors"))
    assert tiny.greedy(shared, PROMPTS, COUNT) != native
    first, second = tiny.report(shared)["layers"]
    assert second["union"] / second["calls"] <= 3, "one expert of each row is kept, and the others go to these"
    assert second["union"] < first["union"] < first["natural_union"]


def test_weights_that_are_replaced(shared: Any, model: Path, other: Path, native: tiny.Tokens, tmp_path: Path) -> None:
    """What was measured on other weights never routes these."""
    shared.collective_rpc("carpool_set", file=str(policy_file(model, tmp_path)))
    tokens = tiny.greedy(shared, PROMPTS, COUNT)
    assert tokens != native
    try:
        tiny.replace(shared, other)
        assert tiny.greedy(shared, PROMPTS, COUNT) == in_transformers(other)
        with pytest.raises(AssertionError, match=r"other weights were loaded, so sharing stays off: .* another model"):
            shared.collective_rpc("carpool_set", enabled=True)
    finally:
        tiny.replace(shared, model)
    assert tiny.greedy(shared, PROMPTS, COUNT) == tokens


IN_VLLM = """
import json, sys
import vllm_models
from pathlib import Path
folder, prompts, count, policy = json.loads(sys.argv[1])
llm = vllm_models.engine(Path(folder), policy)
from vllm import SamplingParams
parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
made = llm.generate([{"prompt_token_ids": one} for one in prompts], parameters, use_tqdm=False)
report = llm.collective_rpc("carpool_report")[0]
keys = ("calls", "rows_changed", "natural_union", "union")
layers = [[layer[key] for key in keys] for layer in report["layers"]]
print("FOUND", json.dumps([[list(one.outputs[0].token_ids) for one in made], layers]))
"""


def test_both_engines_choose_the_same(shared: Any, model: Path) -> None:
    """The same model and requests in vLLM, token by token, and the counters of every layer."""
    tokens = tiny.greedy(shared, PROMPTS, COUNT)
    keys = ("calls", "rows_changed", "natural_union", "union")
    layers = [[layer[key] for key in keys] for layer in tiny.report(shared)["layers"]]
    parts = os.environ["PYTHONPATH"].split(os.pathsep)
    path = [part for part in parts if not any((Path(part) / name).exists() for name in ("triton", "torchvision"))]
    given = json.dumps([str(model), PROMPTS, COUNT, POLICY])
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM, given], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(Path(__file__).parent)])},
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr[-2000:]
    assert json.loads(found[0].removeprefix("FOUND ")) == [tokens, layers]
