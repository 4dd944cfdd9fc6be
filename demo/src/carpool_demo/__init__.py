"""The reference models of Carpool and held-out text to try them on."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"
DIFFUSION_MODEL = HERE / "diffusion_model"
TEXTS = HERE / "texts"

__all__ = ["DIFFUSION_MODEL", "MODEL", "TEXTS", "diffusion_model_path"]


def diffusion_model_path() -> Path:
    """The folder of the block-diffusion model, in transformers' format (Qwen3-MoE).

    Its `config.json` has `mask_token_id`, `block_size` (what to decode with unless told otherwise) and `block_sizes`
    (what it was trained for).

    Raises:
        FileNotFoundError: this build of the distribution does not have that model
    """
    if not (DIFFUSION_MODEL / "config.json").is_file():
        raise FileNotFoundError(
            f"{DIFFUSION_MODEL} has no model: this build of carpool-demo comes without the block-diffusion model; "
            "train it with recipes/diffusion_model or name a model"
        )
    return DIFFUSION_MODEL
