"""Carpool in Hugging Face transformers: the host for quality, calibration and research (no speed is claimed here)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carpool.hosts.transformers.hooks import Attachment, attach
    from carpool.hosts.transformers.known import Known
    from carpool.hosts.transformers.layers import MoELayer, find_layers, fingerprint, identity, weight_bytes
    from carpool.hosts.transformers.loading import Opened, load_model, open_model
    from carpool.hosts.transformers.run import Run, share

__all__ = [
    "Attachment",
    "Known",
    "MoELayer",
    "Opened",
    "Run",
    "attach",
    "find_layers",
    "fingerprint",
    "identity",
    "load_model",
    "open_model",
    "share",
    "weight_bytes",
]

# imported when it is asked for: hooks need torch's compiler, which `carpool doctor` does without
_HOMES = {
    "hooks": ("Attachment", "attach"),
    "known": ("Known",),
    "layers": ("MoELayer", "find_layers", "fingerprint", "identity", "weight_bytes"),
    "loading": ("Opened", "load_model", "open_model"),
    "run": ("Run", "share"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"{__name__}.{home}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
