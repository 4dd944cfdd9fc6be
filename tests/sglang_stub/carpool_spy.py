"""What tests and measurements ask of SGLang beyond Carpool, each by a variable of the environment.

`CARPOOL_SPY=FILE` writes what shared routers did to the file: a list of calls, each a dictionary. `CARPOOL_MASK=ID`
lets SGLang, which knows one mask token an architecture, denoise a model with another.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

FILE, MASK = "CARPOOL_SPY", "CARPOOL_MASK"
calls: list[dict[str, Any]] = []


def register() -> None:
    """SGLang's plugin; does nothing where nothing is asked for."""
    if MASK in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.dllm.config.DllmConfig.__init__", _masked, HookType.AROUND)
    if FILE in os.environ:
        _spy(Path(os.environ[FILE]))


def _masked(original: Any, *args: Any, **kwargs: Any) -> None:
    original(*args, **(kwargs | {"mask_id": int(os.environ[MASK])}))


def _spy(path: Path) -> None:
    import torch

    from carpool.hosts.sglang import host

    routed = host.routed
    if hasattr(routed, "__wrapped__"):
        return

    @functools.wraps(routed)
    def seen(layer: Any, hidden_NH: Any, logits_NE: Any, native: Any) -> Any:
        found = routed(layer, hidden_NH, logits_NE, native)
        rows = layer.step.rows
        if rows.expected:
            calls.append({
                "layer": layer.index, "logits": logits_NE.clone(), "native": native.ids_NK.clone(),
                "ids": found.ids_NK.clone(), "weights": found.weights_NK.clone(),
                "exempt": rows.batch(len(logits_NE)).exempt_N.clone(),
            })  # fmt: skip
            torch.save(calls, path)
        return found

    host.routed = seen
