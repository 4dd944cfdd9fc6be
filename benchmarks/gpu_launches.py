"""How many kernels a layer's routing launches: ours, and the operations that they replace."""

from __future__ import annotations

from typing import Any

from gpu_layer import Call
from torch.utils._python_dispatch import TorchDispatchMode

from carpool.kernels import launch

KERNELS = ("vote", "decide")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view")


class Operations(TorchDispatchMode):
    """Counts ATen operations that a device would run, each as one kernel at least: no views and no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


class Counted:
    """In place of a kernel: counts its launches, and launches nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            self.count += 1

        return run


def launches(call: Call) -> dict[str, int]:
    """Of one call: our kernels and the operations beside them, the general path's operations, the router's own."""
    ours, kernels = Counted(), {name: getattr(launch, name) for name in KERNELS}
    vars(launch).update(dict.fromkeys(KERNELS, ours))
    try:
        with Operations() as beside:
            call.launches()
    finally:
        vars(launch).update(kernels)
    with Operations() as general:
        call.general()
    with Operations() as router:
        call.layer.rule.native(call.logits_NE)
    return {
        "launches": ours.count,
        "operations_beside": beside.count,
        "operations_general": general.count,
        "operations_router": router.count,
    }
