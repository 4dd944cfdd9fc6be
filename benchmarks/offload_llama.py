"""llama.cpp on a mapped file beside experts on disk: for `offload_speed.py`.

    pip install --target peers --no-deps llama-cpp-python gguf diskcache      # builds llama.cpp for this processor

Which experts a token takes is forced without touching llama.cpp: every token of the run has an embedding of its own,
which outweighs all that layers add, and routers are solved for the experts that the replayed routing says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from offload_model import EXPERTS, STEPS, Counted
from torch import Tensor

FIRST, LOUD, APART = 16, 100.0, 4.0  # first token; size of embeddings; how far chosen logits are from others
PYTHON = 256 << 20  # bytes that the process takes before llama.cpp does anything


def llama_row(
    folder: Path, layers: int, ids: Callable[[int], Tensor], kind: str, share: float, batch: int, model: Any
) -> dict[str, Any]:
    """What llama.cpp makes of a batch, with memory for a share of the experts."""
    from offload_limit import forget, limited

    path = folder / f"{kind}.gguf"
    if not path.exists():
        _write(path, layers, kind, [ids(one) for one in STEPS], model)
    experts = _expert_bytes(path)
    forget(path)
    first = FIRST + sum(one * sum(STEPS[one]) for one in STEPS if one < batch)
    with limited(int(share * experts) + path.stat().st_size - experts + PYTHON):
        command = [sys.executable, __file__, str(path), str(batch), str(first)]
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        made = subprocess.run(command, check=True, capture_output=True, text=True, env=paths)
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def forced(ids_SLBK: Sequence[Tensor], hidden: int) -> tuple[Tensor, Tensor]:
    """Embeddings of the tokens of all batches, one behind the other, and routers `[L, E, H]` that choose as told."""
    chosen_TLK = torch.cat([one.permute(0, 2, 1, 3).flatten(0, 1) for one in ids_SLBK])
    T, L, _ = chosen_TLK.shape
    table_TH = torch.randn(T, hidden, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    table_TH /= table_TH.pow(2).mean(-1, keepdim=True).sqrt()
    wanted_TLE = torch.full((T, L, EXPERTS), -APART, dtype=torch.float64).scatter(-1, chosen_TLK, APART)
    router_LEH = torch.einsum("ht,tle->leh", torch.linalg.pinv(table_TH), wanted_TLE)
    made_TLE = torch.einsum("th,leh->tle", table_TH, router_LEH)
    if not torch.equal(made_TLE.topk(chosen_TLK.shape[-1], -1).indices.sort(-1).values, chosen_TLK.sort(-1).values):
        raise SystemExit("routers cannot be solved for this routing: too many tokens")
    return LOUD * table_TH.float(), router_LEH.float()


def _write(path: Path, layers: int, kind: str, ids: Sequence[Tensor], model: Any) -> None:
    from dataclasses import replace

    from engines import GEOMETRIES
    from llama_peer import write_gguf
    from safetensors.torch import save_file

    geometry = replace(GEOMETRIES["qwen3-30b-a3b"], experts=EXPERTS)
    table_TH, router_LEH = forced(ids, geometry.hidden)
    held = {name: one.detach().clone() for name, one in model.state_dict().items()}
    embedding = held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"].float()
    embedding[FIRST : FIRST + len(table_TH)] = table_TH
    for place in range(layers):
        held[f"model.layers.{place}.mlp.gate.weight"] = router_LEH[place].contiguous()
    beside = path.with_suffix(".safetensors")
    save_file(held, beside)
    write_gguf(beside, geometry, layers, kind, path)
    beside.unlink()


def _expert_bytes(path: Path) -> int:
    import gguf

    return sum(int(one.n_bytes) for one in gguf.GGUFReader(path).tensors if "_exps" in one.name)


def main() -> None:
    """One cell: PATH BATCH TOKEN, the first of its tokens."""
    from llama_peer import Llama

    path, (batch, first) = sys.argv[1], map(int, sys.argv[2:])
    peer, counts = Llama(Path(path), 2, mapped=True), Counted(batch)
    for step in range(sum(STEPS[batch])):
        if step == STEPS[batch][0]:
            counts.begin()
        peer.step([first + step * batch + row for row in range(batch)], step)
    print(json.dumps(counts.end()))


if __name__ == "__main__":
    main()
