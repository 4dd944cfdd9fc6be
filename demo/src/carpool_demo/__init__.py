"""The reference model of Carpool and held-out text to try it on."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"
TEXTS = HERE / "texts"

__all__ = ["MODEL", "TEXTS"]
