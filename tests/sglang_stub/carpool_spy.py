"""What tests and measurements ask of SGLang beyond Carpool, each by a variable of the environment.

`CARPOOL_SPY=FILE` writes what shared routers did to the file: a list of calls, each a dictionary (rank `n` of several
to `FILE.n`). `CARPOOL_MASK=ID` lets SGLang, which knows one mask token an architecture, denoise a model with another.
`CARPOOL_BYPASS=N` routes batches of N rows past `select_experts`, as a kernel that routes by itself does.
"""

from __future__ import annotations

import os
from typing import Any

FILE, MASK, BYPASS = "CARPOOL_SPY", "CARPOOL_MASK", "CARPOOL_BYPASS"
FORKS = "CARPOOL_FORKS"  # SGLang's processes come from this one, which may set the others later
HOOKS = {
    MASK: ("sglang.srt.dllm.config.DllmConfig.__init__",),
    BYPASS: tuple(f"sglang.srt.layers.moe.topk.TopK.{name}" for name in ("forward_native", "forward_cpu")),
    FILE: ("carpool.hosts.sglang.host.routed",),
}
calls: list[dict[str, Any]] = []


def register() -> None:
    """SGLang's plugin; does nothing where nothing is asked for."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for (name, targets), hook in zip(HOOKS.items(), (_masked, _bypassed, _seen), strict=True):
        for target in targets if name in os.environ or FORKS in os.environ else ():
            HookRegistry.register(target, hook, HookType.AROUND)


def _masked(original: Any, *args: Any, **kwargs: Any) -> None:
    mask = os.environ.get(MASK)
    original(*args, **(kwargs if mask is None else kwargs | {"mask_id": int(mask)}))


def _bypassed(original: Any, topk: Any, hidden_NH: Any, logits_NE: Any, *args: Any, **kwargs: Any) -> Any:
    if len(logits_NE) != int(os.environ.get(BYPASS, -1)):
        return original(topk, hidden_NH, logits_NE, *args, **kwargs)
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    weights_NK, ids_NK = logits_NE.float().softmax(-1).topk(topk.topk_config.top_k)
    return StandardTopKOutput(weights_NK, ids_NK.int(), logits_NE)


def _seen(original: Any, layer: Any, hidden_NH: Any, logits_NE: Any, native: Any) -> Any:
    found = original(layer, hidden_NH, logits_NE, native)
    path, rows = os.environ.get(FILE), layer.step.rows
    if path is not None and rows.expected:
        import torch
        from sglang.srt.runtime_context import get_parallel

        calls.append({
            "layer": layer.index, "logits": logits_NE.clone(), "native": native.ids_NK.clone(),
            "ids": found.ids_NK.clone(), "weights": found.weights_NK.clone(),
            "exempt": rows.batch(len(logits_NE)).exempt_N.clone(),
        })  # fmt: skip
        rank = int(get_parallel().tp_rank)
        torch.save(calls, f"{path}.{rank}" if rank else path)
    return found
