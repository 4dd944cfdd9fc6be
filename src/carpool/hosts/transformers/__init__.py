"""Carpool in Hugging Face transformers: the host for quality, calibration and research (no speed is claimed here)."""

from __future__ import annotations

from carpool.hosts.transformers.hooks import Attachment, attach
from carpool.hosts.transformers.known import Known
from carpool.hosts.transformers.layers import MoELayer, find_layers, fingerprint, identity
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
]
