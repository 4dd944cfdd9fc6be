"""Bit planes and their quantisers: exact packing, nested codes, bytes, and feedback against its slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool import CarpoolError
from carpool.experts.planes import Planes, pack, unpack
from carpool.experts.rounding import damped, nested_feedback, nested_round
from carpool.experts.stored import StoredExperts

DEPTHS = (2, 3, 4, 6)


@given(
    width=st.integers(1, 70), bits=st.integers(1, 8), fewer=st.integers(0, 7), seed=st.integers(0, 99)
)  # fmt: skip
def test_packing_is_exact_and_fewer_planes_are_the_first_bits(width: int, bits: int, fewer: int, seed: int) -> None:
    codes_ERI = torch.randint(0, 2**bits, (2, 3, width), generator=torch.Generator().manual_seed(seed))
    planes_DERB = pack(codes_ERI, bits)
    assert planes_DERB.shape == (bits, 2, 3, -(-width // 8))
    assert torch.equal(unpack(planes_DERB, width), codes_ERI.int())
    kept = max(1, bits - fewer)
    assert torch.equal(unpack(planes_DERB[:kept], width), codes_ERI.int() >> (bits - kept))


def weights(seed: int = 0, width: int = 40) -> torch.Tensor:
    return torch.randn(3, 8, width, generator=torch.Generator().manual_seed(seed)) / 9


def test_a_weight_is_the_middle_of_its_cell() -> None:
    weight_ERI = weights()
    planes = nested_round(weight_ERI, DEPTHS, group=16)
    codes_ERI = unpack(planes.planes_DERB, 40)
    for place, depth in enumerate(DEPTHS):
        read_ERI = planes.read(depth)
        for expert, row, column in ((0, 0, 0), (1, 5, 17), (2, 7, 39)):
            code = int(codes_ERI[expert, row, column]) >> (6 - depth)
            scale = float(planes.scale_LERG[place, expert, row, column // 16]) * float(planes.unit_E[expert])
            assert float(read_ERI[expert, row, column]) == pytest.approx((code - (2**depth - 1) / 2) * scale, rel=1e-6)


def test_every_depth_halves_the_error_and_is_nearly_as_good_as_a_quantiser_of_its_own() -> None:
    weight_ERI = weights(width=64)
    nested = nested_round(weight_ERI, DEPTHS)
    lost = [float((nested.read(depth) - weight_ERI).norm()) for depth in DEPTHS]
    own = [float((nested_round(weight_ERI, (depth,)).read(depth) - weight_ERI).norm()) for depth in DEPTHS]
    assert lost == sorted(lost, reverse=True)
    assert all(1 - 1e-6 <= a / b < 1.25 for a, b in zip(lost, own, strict=True)), (lost, own)


def test_small_weights_keep_their_precision() -> None:
    """Scales are stored in float16, whose smallest normal number is 6e-5."""
    weight_ERI = weights()
    tiny = nested_round(weight_ERI * 2.0**-20, DEPTHS).read(6) * 2.0**20
    torch.testing.assert_close(tiny, nested_round(weight_ERI, DEPTHS).read(6), rtol=1e-3, atol=1e-5)


def moments(seed: int = 1, width: int = 40) -> torch.Tensor:
    """Inputs that go together, or feedback would have nothing to use."""
    generator = torch.Generator().manual_seed(seed)
    x_ENI = torch.randn(3, 200, 8, generator=generator) @ torch.randn(3, 8, width, generator=generator)
    x_ENI = x_ENI + torch.randn(3, 200, width, generator=generator) / 2
    return x_ENI.mT @ x_ENI


def energy(error_ERI: torch.Tensor, moment_EII: torch.Tensor) -> float:
    return float(((error_ERI @ moment_EII) * error_ERI).sum())


def test_feedback_loses_less_of_the_outputs_at_every_depth() -> None:
    weight_ERI, moment_EII = weights(), moments()
    rounded, fed = nested_round(weight_ERI, DEPTHS, 16), nested_feedback(weight_ERI, moment_EII, DEPTHS, 16)
    for depth in DEPTHS:
        before, after = (energy(one.read(depth) - weight_ERI, moment_EII) for one in (rounded, fed))
        assert after < 0.8 * before, depth


@pytest.mark.parametrize("centre", [0.5, 0.0])
def test_feedback_at_one_depth_is_gptq(centre: float) -> None:
    """Against the plain recursion: quantise an input, solve the rest for what it leaves, go on."""
    weight_ERI, moment_EII = weights()[:1, :2], damped(moments()[:1])
    given = nested_feedback(weight_ERI, moments()[:1], (3,), 40, centre)
    codes = given.codes(3)[0]
    from carpool.experts.rounding import _search

    _, scale_LERG = _search(weight_ERI, moment_EII.diagonal(dim1=-2, dim2=-1), (3,), 40, centre)
    scale_R1 = scale_LERG[0, 0]
    left, free = weight_ERI[0].double().clone(), list(range(40))
    for column in range(40):
        wanted = left[:, column] / scale_R1[:, 0].double()
        code = (wanted + 4.5 - centre).floor().clamp(0, 7)
        assert torch.equal(code.int(), codes[:, column]), column
        error = left[:, column] - (code - 4 + centre) * scale_R1[:, 0].double()
        free = free[1:]
        if free:
            # the rest absorbs the error: least squares over the inputs that are not rounded yet
            inner = moment_EII[0].double()[free][:, free]
            cross = moment_EII[0].double()[column, free]
            left[:, free] += error.unsqueeze(-1) * torch.linalg.solve(inner, cross)


def test_an_expert_without_tokens_is_rounded() -> None:
    weight_ERI, moment_EII = weights(), moments()
    moment_EII[1] = 0
    fed = nested_feedback(weight_ERI, moment_EII, (4,), 16)
    plain = nested_round(weight_ERI, (4,), 16)
    assert float((fed.read(4)[1] - weight_ERI[1]).norm()) <= float((plain.read(4)[1] - weight_ERI[1]).norm()) * 1.01


def test_bytes_are_those_of_the_tensors() -> None:
    planes = nested_round(weights(), DEPTHS, 16)
    held = sum(tensor.nbytes for tensor in planes.tensors().values())
    assert planes.bytes_stored * planes.num_experts == held
    assert planes.bytes_read(2) == 8 * (2 * 5 + 2 * 3) + 4
    stored = StoredExperts(nested_round(weights(1, 32), (4,)), nested_round(torch.randn(3, 32, 4), (4,)))
    assert stored.sizes[4] == stored.bytes_read(4) / (2 * (8 * 32 + 32 * 4))


def test_what_it_refuses() -> None:
    planes = nested_round(weights(), DEPTHS, 16)
    with pytest.raises(CarpoolError, match="not at 5"):
        planes.read(5)
    with pytest.raises(CarpoolError, match="ascending"):
        Planes(planes.planes_DERB, planes.scale_LERG, planes.unit_E, (3, 2), 40, 16)
    with pytest.raises(CarpoolError, match="do not hold"):
        Planes(planes.planes_DERB, planes.scale_LERG, planes.unit_E, DEPTHS, 48, 16)
    with pytest.raises(CarpoolError, match="carpool compress"):
        StoredExperts.of({})
