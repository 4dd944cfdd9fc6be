"""What `config.json` decides is refused before weights load, in the sentences of the loaded model, and ends in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from carpool import CarpoolError
from carpool.hosts.engine.settings import Settings
from carpool.hosts.vllm.early import check_configuration


class Model:
    """vLLM's configuration of a model, as far as it is read."""

    architectures = ("SomeForCausalLM",)

    def __init__(self, family: str = "qwen3_moe", experts: int = 32, top_k: int = 4, **more: Any) -> None:
        self.hf_text_config = SimpleNamespace(model_type=family, to_dict=lambda: {"hidden_size": 64, **more})
        self.get_num_experts, self.get_num_experts_per_tok = lambda: experts, lambda: top_k


def settings(**given: Any) -> Settings:
    found = Settings.of({"carpool": {"isolation": "batch"} | given})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        (Model(), "xshare(budget=999)", "budget=999 asks for 999 of 32 experts"),
        (Model(), "topk(k=9)", "k=9"),
        (Model(), "sere(top=2)", "needs the statistics .*`carpool calibrate"),
        (Model("qwen3", 0, 0), "topk(k=2)", "SomeForCausalLM has no mixture-of-experts layer"),
        (Model("llama4_text"), "topk(k=2)", "family llama4_text cannot be shared: .*routes it by a function"),
        (Model("ernie4_5_moe"), "topk(k=2)", "family ernie4_5_moe cannot be shared: .*correction bias"),
    ],
)
def test_refused_by_the_configuration(model: Any, policy: str, message: str) -> None:
    with pytest.raises(CarpoolError, match=message):
        check_configuration(model, settings(policy=policy), on_cpu=True)


def test_what_it_does_not_say_decides_nothing() -> None:
    check_configuration(Model(), settings(policy="xshare(budget=8)"), on_cpu=True)
    check_configuration(SimpleNamespace(), settings(policy="xshare(budget=999)"), on_cpu=True)
    check_configuration(Model(experts=0, moe_num_things=8), settings(policy="xshare(budget=999)"), on_cpu=True)
    check_configuration(Model("ernie4_5_moe"), settings(policy="topk(k=2)"), on_cpu=False)
    brave = settings(policy="topk(k=2)", allow_untested_engine=True)
    check_configuration(Model("llama4_text"), brave, on_cpu=True)  # its layers are looked at


def test_files_are_looked_at(tmp_path: Path) -> None:
    missing = settings(policy="sere(top=2)", stats=str(tmp_path / "none.safetensors"))
    with pytest.raises(CarpoolError, match=r"none\.safetensors"):
        check_configuration(Model(), missing, on_cpu=True)
    path = tmp_path / "policy.json"
    path.write_text('{"schema": 1, "policy": "xshare(budget=8)", "layers": {"1": {"budget": 99}}}')
    with pytest.raises(CarpoolError, match="99 of 32 experts"):
        check_configuration(Model(), settings(file=str(path)), on_cpu=True)
    path.write_text('{"schema": 1, "policy": "xshare(budget=8)", "model": {"num_experts": 64}}')
    with pytest.raises(CarpoolError, match="a model with experts: 64, this one has 32"):
        check_configuration(Model(), settings(file=str(path)), on_cpu=True)


def test_names_of_statistics_are_read_without_their_numbers(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "some.safetensors"
    save_file({"layers.0.similarity_output": torch.zeros(2), "layers.0.coverage": torch.zeros(2)}, path)
    given = settings(policy="sere(top=2)", stats=str(path))
    with pytest.raises(CarpoolError, match="needs the statistics"):
        check_configuration(Model(), settings(policy="surrogate(budget=8)", stats=str(path)), on_cpu=True)
    names = [name for plan in given.policies.plans for name in plan.required_stats()]
    save_file({f"layers.0.{name}": torch.zeros(2) for name in names}, path)
    check_configuration(Model(), given, on_cpu=True)


PROGRAM = """
import sys
from carpool import CarpoolError
from carpool.hosts.engine.refusal import end_with_the_sentence
sys.argv[0] = {name!r}
end_with_the_sentence("vllm")
end_with_the_sentence("vllm")
raise {error}
"""


@pytest.mark.parametrize(
    ("name", "error", "traceback"),
    [("/bin/vllm", "CarpoolError('budget=999')", False), ("mine.py", "CarpoolError('budget=999')", True),
     ("/bin/vllm", "ValueError('another')", True)],
)  # fmt: skip
def test_a_refusal_is_the_last_line_of_vllms_command(name: str, error: str, traceback: bool) -> None:
    program = PROGRAM.format(name=name, error=error)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ("Traceback" in ended.stderr) == traceback
    if not traceback:
        assert ended.stderr == "carpool: budget=999\n"
