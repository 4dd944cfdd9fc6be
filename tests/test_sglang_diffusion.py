"""Block diffusion in a real SGLang, on a CPU, against `carpool.diffusion` on the same model: `make test-sglang`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sglang_models as tiny
import torch

from carpool import share
from carpool.diffusion import Decoding, Generation, Session, TeamCold, generate

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow

TOP_K = 4  # of 32 experts, in both families
THRESHOLD = 0.02  # a random model is sure of little
PROMPT = [5, 6, 7, 8, 9, 10]
COLD = TeamCold(confidence=0.02, near=0, surest=1)
Sets = list[tuple[int, list[list[int]]]]  # of each routed call: the layer, and the experts of its rows


@dataclass(frozen=True)
class Family:
    """Block size and new tokens; the folder that SGLang serves, and the same model for transformers."""

    block: int
    count: int
    folder: Path
    twin: Path


@pytest.fixture(scope="module", params=["sdar_moe", "llada2_moe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sdar_moe":
        return Family(4, 12, tiny.write_sdar(folder), folder)
    return Family(32, 40, tiny.write_llada2(folder), folder / "twin")


@pytest.fixture(scope="module")
def spied(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spied") / "calls.pt"


@pytest.fixture(scope="module")
def running(family: Family, spied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = tmp_path_factory.mktemp("settings") / "low_confidence.yaml"
    settings.write_text(f"threshold: {THRESHOLD}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARPOOL_SPY", str(spied))
        given = {"policy": f"des_seq(k0={TOP_K})", "voters": "team_cold(confidence=0.02, near=0, surest=1)"}
        engine = tiny.engine(family.folder, given, dllm_algorithm="LowConfidence", dllm_algorithm_config=str(settings))
        yield engine
        engine.shutdown()


def in_sglang(running: Any, family: Family, spied: Path, policy: str | None) -> tuple[list[int], Sets]:
    running.flush_cache()
    change = {"enabled": False} if policy is None else {"enabled": True, "policy": policy}
    running.collective_rpc("carpool_set", **change)
    running.collective_rpc("carpool_report", reset=True)
    before = len(torch.load(spied)) if spied.exists() else 0
    [tokens] = tiny.greedy(running, [PROMPT], family.count)
    calls = torch.load(spied)[before:] if spied.exists() else []
    places = sorted({call["layer"] for call in calls})  # of layers with experts: LLaDA2's first has none
    return tokens, [
        (places.index(call["layer"]), used(call["ids"], call["weights"])) for call in calls if not call["exempt"].all()
    ]


def in_transformers(family: Family, policy: str | None, cold: TeamCold | None) -> tuple[Generation, Sets]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(family.twin, dtype=torch.float32, experts_implementation="eager")
    decoding = Decoding(block=family.block, mask_token=tiny.MASK, threshold=THRESHOLD, max_new=family.count)
    prompts = [torch.tensor(PROMPT)]
    if policy is None:
        return generate(Session(loaded, prompts, family.block), prompts, decoding), []
    sets: Sets = []

    def observe(place: int, batch: Any, outcome: Any) -> None:
        if not batch.exempt_N.all():
            sets.append((place, used(outcome.routing.ids_NK, outcome.routing.weights_NK)))

    with share(loaded, policy, group="request", observe=observe) as run:
        return generate(Session(loaded, prompts, family.block, run=run), prompts, decoding, voters=cold), sets


def used(ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> list[list[int]]:
    rows = zip(ids_NK.tolist(), weights_NK.tolist(), strict=True)
    return [sorted({expert for expert, weight in zip(*row, strict=True) if weight}) for row in rows]


def test_without_a_policy_it_is_sglang(running: Any, family: Family, spied: Path) -> None:
    tokens, _ = in_sglang(running, family, spied, None)
    made, _ = in_transformers(family, None, None)
    assert tokens == made.tokens[0].tolist()
    assert tiny.report(running)["steps"]["passes"] == 0


@pytest.mark.parametrize("policy", [f"des_seq(k0={TOP_K})", "des_seq(k0=1)", "des_vote(size=6)"])
def test_the_same_experts_as_on_the_same_model_elsewhere(
    running: Any, family: Family, spied: Path, policy: str
) -> None:
    """Forward by forward, layer by layer, row by row; cold rows have no say in either."""
    tokens, sets = in_sglang(running, family, spied, policy)
    made, expected = in_transformers(family, policy, COLD)
    assert tokens == made.tokens[0].tolist()
    assert sets == expected
    found = tiny.report(running)
    assert [layer["calls"] for layer in found["layers"]] == [len(made.forwards)] * 2
    assert all(layer["rows_changed"] > 0 for layer in found["layers"])
    assert found["steps"]["passes_exempt"] > 0, "blocks of the prompt and finished ones"


def test_what_the_cache_holds_is_stock(running: Any, family: Family, spied: Path) -> None:
    """Finished blocks are written under native routing, so they may be found by others."""
    tokens, _ = in_sglang(running, family, spied, "des_vote(size=6)")
    longer = PROMPT + tokens
    running.collective_rpc("carpool_set", enabled=False)
    given = {"temperature": 0, "max_new_tokens": family.block, "ignore_eos": True}
    found = running.generate(input_ids=longer, sampling_params=given)
    assert found["meta_info"]["cached_tokens"] > len(PROMPT)
    running.flush_cache()
    assert running.generate(input_ids=longer, sampling_params=given)["output_ids"] == found["output_ids"]


def test_blocks_of_other_requests_change_nothing(running: Any, family: Family) -> None:
    """Grouped by request, so by block: who else is denoised in the same pass has no say."""
    running.flush_cache()
    running.collective_rpc("carpool_set", enabled=True, policy="des_vote(size=6)")
    others = [[11, 12, 13], [21] * 7]
    together = tiny.greedy(running, [PROMPT, *others], family.count)
    running.flush_cache()
    assert [tiny.greedy(running, [prompt], family.count)[0] for prompt in (PROMPT, *others)] == together
