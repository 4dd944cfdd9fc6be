"""What a pool holds, as far as files and servers say it without loading weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from carpool.artefacts.json_text import read_json
from carpool.errors import CarpoolError
from carpool.models.pool import Expert, Pool

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")


def facts(pool: Pool) -> dict[str, Any]:
    """Sizes, tokenizers and readiness of all experts, and whether they can be fused token by token."""
    experts = [
        {
            "name": one.name, "engine": one.engine, "model": one.model, "bytes": one.bytes,
            "tokenizer": tokenizer(one), "vocabulary": vocabulary(one), "fingerprint": one.fingerprint,
            "ready": ready(one),
        }
        for one in pool.experts
    ]  # fmt: skip
    loaded = {one.weights: one.bytes for one in pool.experts if one.engine != "server"}
    return {
        "experts": experts, "loads": len(loaded), "bytes": sum(loaded.values()), "fusion": _fusion(experts),
        "fingerprint": pool.fingerprint,
    }  # fmt: skip


def tokenizer(expert: Expert) -> str:
    """Hash of the tokenizer's file; empty where it is not in a folder here."""
    files = [Path(expert.model) / name for name in TOKENIZERS] if expert.engine != "server" else []
    found = next((file for file in files if file.is_file()), None)
    return "" if found is None else hashlib.sha256(found.read_bytes()).hexdigest()[:16]


def vocabulary(expert: Expert) -> int:
    """Entries of the model's head; 0 where nobody knows."""
    path = Path(expert.model) / "config.json"
    if expert.engine == "server" or not path.is_file():
        return 0
    config = read_json(path, any_number=True)
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else 0


def ready(expert: Expert) -> str:
    """`yes`, or in words what is missing."""
    if expert.engine == "server":
        from carpool.models.runners.server import served

        try:
            with served(expert):
                return "yes"
        except CarpoolError as error:
            return str(error)
    folder = Path(expert.model)
    if not folder.is_dir():
        a_path = expert.model.startswith((".", "/", "~")) or expert.model.count("/") > 1
        return f"there is no folder {expert.model}" if a_path else "no folder here; the hub is asked when it is loaded"
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json"
    return "yes" if expert.bytes else f"{folder} has no weights in safetensors"


def _fusion(experts: list[dict[str, Any]]) -> str:
    others = [one["name"] for one in experts if one["engine"] != "transformers"]
    if others:
        return f"no, {', '.join(others)} would have to run in transformers: fusion takes whole logits"
    if len({(one["tokenizer"], one["vocabulary"]) for one in experts}) > 1:
        return "no, the experts differ in tokenizer or vocabulary"
    return "yes" if all(one["tokenizer"] for one in experts) else "unknown, no tokenizer is here to look at"
