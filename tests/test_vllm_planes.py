"""Checkpoints in planes inside the real engine: they load, read as deep as the policy says, and off is the deepest."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import CarpoolError, parse
from carpool.artefacts.statistics import Statistics
from carpool.calibrate.compress import compress
from carpool.calibrate.run import signed
from carpool.cli.compress_output import PLANES_FILE, Output
from carpool.experts.stored import SHAPE, StoredExperts
from carpool.hosts.transformers import find_layers, open_model
from carpool.routing.spec import ALL_BITS

pytest.importorskip("vllm", reason="vLLM is an extra")
pytestmark = pytest.mark.vllm
DEPTHS = (2, 3, 4)
POLICY = "depth(price=0.02)"


@functools.cache
def folder() -> Path:
    """The tiny Qwen3-MoE with its experts in planes."""
    made = Path(tempfile.mkdtemp(prefix="carpool-planes-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return in_planes(tiny.qwen3(), made)


def in_planes(source: Path, made: Path) -> Path:
    """What `carpool compress --output` makes of a checkpoint, with text that any model has."""
    opened, output = open_model(source), Output.of(made, "planes", None)
    model = opened.weights()
    layers = find_layers(model)
    ids_BT = torch.randint(3, tiny.VOCABULARY, (12, 64), generator=torch.Generator().manual_seed(0))
    held_B = torch.arange(12) % 3 == 0
    found = compress(model, layers, ids_BT, held_B, depths=DEPTHS, group=32, method="round")
    stats = signed(model, layers, found, hidden_size=64, tokens=ids_BT.numel(), seed=0, data=[("a", "b")])
    output.write(opened, model, stats, "round", {})
    return made


@functools.cache
def at_depth(depth: int) -> Path:
    """The same weights as an ordinary checkpoint: every expert as it is read at a depth."""
    from transformers import AutoModelForCausalLM

    made = Path(tempfile.mkdtemp(prefix="carpool-rounded-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(tiny.qwen3(), dtype=torch.float32)
    for layer in range(2):
        stored = StoredExperts.of(Statistics.tensors_of(folder() / PLANES_FILE, layer, ("planes_",)))
        experts = model.model.layers[layer].mlp.experts
        experts.gate_up_proj.data = stored.into.read(depth)
        experts.down_proj.data = stored.out.read(depth)
    model.save_pretrained(made)
    return made


def apart(found: Any, wanted: Any) -> float:
    """How far the log-probabilities of the first tokens are apart, at most; what is left where weights are the same
    is what activations of 8 bits leave."""
    return max(abs(x[0] - y[0]) for (_, x), (_, y) in zip(found, wanted, strict=True))


@functools.cache
def stock() -> Any:
    return tiny.engine(folder(), None)


@functools.cache
def reading() -> Any:
    return tiny.engine(folder(), {"policy": POLICY, "isolation": "batch"})


def test_without_a_policy_the_deepest_is_read() -> None:
    given = tiny.prompts(4)
    found = tiny.generate(stock(), given, tokens=1)
    assert apart(found, tiny.generate(tiny.engine(at_depth(4), None), given, tokens=1)) < 0.05
    assert apart(found, tiny.generate(tiny.engine(at_depth(2), None), given, tokens=1)) > 0.1


def test_a_policy_reads_as_deep_as_it_chose() -> None:
    llm, given = reading(), tiny.prompts(6)
    calls = tiny.watch(llm)
    found = tiny.generate(llm, given)
    tiny.host(llm).step.observer = None
    sharing = [call.outcome.routing.depth_NK[~call.batch.exempt_N & call.batch.real_N] for call in calls]
    depths = torch.cat([depth_NK.flatten() for depth_NK in sharing])
    assert set(depths.tolist()) >= {2, 4}
    assert set(depths.tolist()) <= {0, *DEPTHS}
    whole = tiny.generate(stock(), given)
    assert [ids for ids, _ in found] != [ids for ids, _ in whole]
    assert [ids[0] for ids, _ in found] == [ids[0] for ids, _ in tiny.generate(stock(), given, tokens=1)]


def test_off_is_stock_bit_for_bit_and_can_be_switched() -> None:
    llm, given = reading(), tiny.prompts(5, seed=3)
    on = tiny.generate(llm, given)
    llm.collective_rpc("carpool_set", kwargs={"enabled": False})
    assert tiny.generate(llm, given) == tiny.generate(stock(), given)
    llm.collective_rpc("carpool_set", kwargs={"enabled": True, "policy": "depth(price=0)"})
    assert tiny.generate(llm, given) == tiny.generate(stock(), given)  # everything at the deepest
    llm.collective_rpc("carpool_set", kwargs={"policy": POLICY})
    assert tiny.generate(llm, given) == on


def test_bits_are_read_as_said_and_prompts_as_deep_as_stored() -> None:
    llm, depths = reading(), []
    llm.collective_rpc("carpool_set", kwargs={"policy": "topk(k=4) | bits(3)"})
    method = tiny.host(llm).layers[1].runner.routed_experts.quant_method
    read = method.read
    method.read = lambda *inputs: depths.append(inputs[3].unique().tolist()) or read(*inputs)
    try:
        tiny.generate(llm, tiny.prompts(4), tokens=3)
    finally:
        method.read = read
        llm.collective_rpc("carpool_set", kwargs={"policy": POLICY})
    assert depths == [[ALL_BITS], [3], [3]]


def test_bytes_are_counted_as_they_are_read() -> None:
    from carpool.hosts.engine.metrics import bytes_read

    llm = reading()
    llm.collective_rpc("carpool_set", kwargs={"policy": POLICY})
    llm.collective_rpc("carpool_report", kwargs={"reset": True})
    calls = tiny.watch(llm)
    tiny.generate(llm, tiny.prompts(6, seed=8))
    host = tiny.host(llm)
    host.step.observer = None
    stored = StoredExperts.of(Statistics.tensors_of(folder() / PLANES_FILE, 0, ("planes_",)))
    wanted = 0
    for call in calls:
        real_NK = (call.outcome.routing.weights_NK != 0) & call.batch.real_N.unsqueeze(-1)
        for depth in call.outcome.depth_of(real_NK).flatten().tolist():
            wanted += stored.bytes_read(min(depth, 4)) if depth else 0
    assert bytes_read(host.step.counters.report(), host.layers)["read_bytes"] == wanted
    natural = bytes_read(host.step.counters.report(), host.layers)["natural_bytes"]
    assert wanted < natural


def test_whole_weights_cannot_be_read_at_depths() -> None:
    with pytest.raises(Exception, match="holds them as whole weights; make one that does not with `carpool compress"):
        tiny.engine(tiny.qwen3(), {"policy": POLICY, "isolation": "batch", "stats": str(folder() / PLANES_FILE)})


def test_depths_that_are_not_served_are_refused_before_serving() -> None:
    """A guard's, and those of statistics of other experts; what names fewer depths is served."""
    from carpool.hosts.engine.fitting import prepare

    layer = tiny.host(reading()).layers[0]
    with pytest.raises(CarpoolError, match=r"bits\(5\): the experts are stored at \[2, 3, 4\] bits"):
        prepare(layer, parse("topk(k=4) | bits(5)"))
    own = layer.statistics
    try:
        layer.statistics = {**own, SHAPE: torch.tensor([32, 64, 32, 2, 3, 4, 6])}
        with pytest.raises(
            CarpoolError, match=r"of experts at \[2, 3, 4, 6\] bits, and the checkpoint's are stored at \[2, 3, 4\]"
        ):
            prepare(layer, parse("hobbit(6, 2)"))
        layer.statistics = {SHAPE: torch.tensor([32, 64, 32, 2, 3])}
        prepare(layer, parse("hobbit(3, 2)"))
        layer.statistics = {}
        assert int(prepare(layer, parse("topk(k=4) | bits(3) | floor(0.1)"))["deepest"]) == 3
    finally:
        layer.statistics = own


def test_buffers_begin_at_all_that_is_stored() -> None:
    from carpool.hosts.vllm.planes import new_buffer

    assert (new_buffer(3, 2, torch.device("cpu")) == ALL_BITS).all()


@pytest.mark.slow
def test_two_ranks_hold_a_part_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import envs

    source = tiny.write_model("qwen3_moe", tmp_path / "source", moe_intermediate_size=64)
    made = in_planes(source, tmp_path / "made")
    given = tiny.prompts(6)
    alone = tiny.generate(tiny.engine(made, None), given)
    envs.disable_envs_cache()  # of the engine that was started before in this process
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    llm = tiny.engine(made, {"policy": POLICY, "isolation": "batch"}, tensor_parallel_size=2)
    found = tiny.generate(llm, given)
    first, second = llm.collective_rpc("carpool_report")
    assert first == second
    assert all(layer["bits_unread"] > 0 for layer in first["layers"])
    assert apart(found, alone) < 0.02  # the first token's, of prompts that are read as deep as stored
    envs.disable_envs_cache()


@pytest.mark.slow
def test_ranks_that_would_split_a_group_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from vllm import envs

    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    with pytest.raises(Exception, match="WorkerProc initialization failed"):
        tiny.engine(folder(), None, tensor_parallel_size=2)
    assert "32 neurons in groups of 32 cannot be split over 2 ranks" in "".join(capfd.readouterr())
    envs.disable_envs_cache()
