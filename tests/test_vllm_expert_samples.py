"""Which of a rank's expert weights the plugin takes a sample of, on made-up experts; no engine needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from carpool.artefacts.identity import Held, differs, sample
from carpool.hosts.vllm.expert_samples import _held, taken

E, H, I = 6, 10, 8  # noqa: E741


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator).bfloat16() for shape in ((E, 2 * I, H), (E, H, I)))  # type: ignore[return-value]


def experts(
    into: Tensor, out: Tensor, *, rank: int = 0, world: int = 1, mine: Tensor | None = None, **more: Any
) -> Any:
    moe = SimpleNamespace(
        intermediate_size=I, intermediate_size_per_partition_unpadded=I // world, hidden_dim_unpadded=H, tp_rank=rank,
        num_experts=E + more.pop("replicas", 0), num_logical_experts=E, is_act_and_mul=more.pop("gated", True),
    )  # fmt: skip
    return SimpleNamespace(moe_config=moe, w13_weight=into, w2_weight=out, _expert_map=mine)


def seen(made: Any) -> Any:
    held = _held(made)
    assert held is not None
    return sample(0, held)


def test_ranks_padding_and_replicas() -> None:
    into, out = weights()
    whole = sample(0, Held(into, out, I)).tensors
    gate, up = into.chunk(2, 1)
    half = slice(4, 8)
    cases = {
        "whole": experts(into, out),
        "half of every expert": experts(torch.cat([gate[:, half], up[:, half]], 1), out[..., half], rank=1, world=2),
        "some experts": experts(into[[4, 0]], out[[4, 0]], mine=torch.tensor([1, -1, -1, -1, 0, -1])),
        "replicas": experts(into[[*range(E), 2]], out[[*range(E), 2]], replicas=1),
        "wider hidden": experts(torch.nn.functional.pad(into, (0, 6)), torch.nn.functional.pad(out, (0, 0, 0, 6))),
        "wider inside": experts(into.new_zeros(E, 24, H), torch.nn.functional.pad(out, (0, 4))),
    }
    numbers = {}
    for name, made in cases.items():
        found = seen(made)
        assert not differs(whole, found), name
        numbers[name] = {key: int((~tensor.isnan()).sum()) for key, tensor in found.tensors.items()}
        made.w2_weight.neg_()
        assert differs(whole, seen(made)), name
        made.w2_weight.neg_()
    every = E * 16
    assert (
        numbers["whole"] == numbers["replicas"] == numbers["wider hidden"] == {"sample_in": every, "sample_out": every}
    )
    assert numbers["wider inside"] == {"sample_out": every}
    assert numbers["some experts"] == {"sample_in": 2 * 16, "sample_out": 2 * 16}
    assert numbers["half of every expert"]["sample_in"] == every // 2, "the last row of the up projection"
    assert every // 4 < numbers["half of every expert"]["sample_out"] < 3 * every // 4


def test_experts_without_a_gate() -> None:
    into, out = weights()
    up = into[:, :I]
    assert not differs(sample(0, Held(up, out, I)).tensors, seen(experts(up, out, gated=False)))


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(E, H, I // 2, dtype=torch.uint8), torch.zeros(E, H, I // 2, dtype=torch.int8),
        torch.zeros(E, H // 2, I), torch.zeros(E, H * I),
    ],
)  # fmt: skip
def test_packed_weights_are_none(out: Tensor) -> None:
    assert _held(experts(torch.zeros(E, 2 * I, H), out)) is None


def test_experts_that_were_never_seen() -> None:
    assert "before anybody could look" in taken(SimpleNamespace()).hidden
