"""Load a model and its tokenizer, or say in one sentence why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from carpool.errors import CarpoolError
from carpool.hosts.transformers.layers import MoELayer, find_layers

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_model(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    check: Callable[[list[MoELayer]], None] = lambda layers: None,
) -> tuple[Any, Any]:
    """A causal language model with MoE layers, in evaluation mode, and its tokenizer.

    Args:
        path: a folder in transformers format, or a name `organisation/model` on the Hugging Face hub; None is the
            reference model (`carpool[demo]`).
        dtype: of the weights; default fp32, or the checkpoint's own where a `device_map` is given.
        device_map: passed on to transformers; default: the CPU.
        check: is shown the model's MoE layers before any weight is read, and may raise.

    Raises:
        CarpoolError: no such folder or model, no configuration, weights or tokenizer in it, weights that do not fit,
            a dense model, or a router Carpool does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, local = _source(path)
    where: dict[str, Any] = {"local_files_only": local}
    config = _try(source, "configuration", lambda: AutoConfig.from_pretrained(source, **where))
    with torch.device("meta"):  # the architecture alone, before gigabytes are read
        shell = _try(source, "configuration", lambda: AutoModelForCausalLM.from_config(config))
    check(find_layers(shell))
    tokenizer = _try(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, **where))
    if dtype is None:
        dtype = torch.float32 if device_map is None else "auto"
    model, info = _try(
        source,
        "weights",
        lambda: AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, device_map=device_map, output_loading_info=True, **where
        ),
    )
    lacking = sorted(map(str, info.get("missing_keys", ()))) + sorted(map(str, info.get("mismatched_keys", ())))
    if lacking:
        raise CarpoolError(f"{source}: the weights lack {lacking[0]} and {len(lacking) - 1} more; download them again")
    return model.eval(), tokenizer


def _source(path: str | Path | None) -> tuple[str, bool]:
    """Where to load from, and whether that is a folder."""
    if path is None:
        try:
            from carpool_demo import MODEL
        except ImportError:
            raise CarpoolError("the reference model is not installed: pip install 'carpool[demo]'") from None
        path = MODEL
    folder = Path(path).expanduser()
    if str(path) and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CarpoolError(f"{path} has no config.json; give a folder in transformers format")
        return str(folder), True
    if folder.is_file():
        raise CarpoolError(f"{path} is a file; give the folder of a model in transformers format")
    if isinstance(path, str) and HUB_NAME.fullmatch(path):
        return path, False
    raise CarpoolError(f"there is no folder {str(path)!r}; give a model's folder, or its name as organisation/model")


def _try(source: str, what: str, load: Any) -> Any:
    try:
        return load()
    except CarpoolError:
        raise
    except Exception as error:  # transformers, hub and safetensors each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CarpoolError(f"cannot load the {what} of {source}: {reason}") from None
