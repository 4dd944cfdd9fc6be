"""One operation: rows, their experts, weights and depths in; the weighted sum of what the experts give out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.experts.stored import StoredExperts
from carpool.kernels.experts import build, reference
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import INPUTS, Experts

Reader = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden_NH, ids_NK, weights_NK, depth_NK


def reader(stored: StoredExperts, activation: Activation | None = None, *, kernels: bool = True) -> Reader:
    """What reads a layer's experts on the device that they are on: kernels, or plain torch where there are none.

    The experts are laid out anew for the kernels; nothing of what was given is kept then.

    Args:
        kernels: where there are some; otherwise plain torch anyway.
    """
    device = stored.into.unit_E.device.type
    if kernels and (device == "cuda" or (device == "cpu" and stored.into.group % INPUTS == 0 and build.ready())):
        return partial(read_experts, experts=Experts.of(stored, activation))
    return partial(reference.read_experts, stored=stored, activation=activation)


def read_experts(
    hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, depth_NK: Tensor, experts: Experts, instructions: str = ""
) -> Tensor:
    """The weighted sum of the experts' outputs with every pair computed at its depth, `[N, H]`.

    An expert's planes are read once, as deep as its deepest pair asks. A row's result hangs on nothing but the row:
    it is the same bits whatever rows, groups or threads are beside it, and its `K` terms are added in their order.
    On CPUs activations are rounded to whole numbers of 8 bits, with a scale a row and group; sums are exact until they
    meet the scales.

    Args:
        hidden_NH: float32, bfloat16 or float16. ids_NK: int. weights_NK: a pair of weight 0 is left out.
        depth_NK: an offered depth, `ALL_BITS` for the deepest, or 0 for a pair that is left out.
        instructions: kind of instructions on CPUs, one of `build.instructions()`; default: the fastest.

    Raises:
        CarpoolError: there are no kernels for this device.
        RuntimeError: an expert or a depth that is not there (on CPUs).
    """
    if hidden_NH.device.type != "cpu":
        from carpool.kernels.experts.on_device import read_experts as on_device

        return on_device(hidden_NH, ids_NK, weights_NK, depth_NK, experts)
    if not build.ready():
        raise CarpoolError("the kernels that read experts cannot be built here; the log says why")
    into, out, activation = experts.into, experts.out, experts.activation
    return torch.ops.carpool.read_experts(
        hidden_NH, ids_NK, weights_NK, depth_NK,
        into.planes_EDB, into.scale_ELOG, into.unit_E, into.bias_ER,
        out.planes_EDB, out.scale_ELOG, out.unit_E, out.bias_ER,
        experts.depths, experts.inner, experts.group, activation.alpha, activation.limit, instructions,
    )  # fmt: skip
