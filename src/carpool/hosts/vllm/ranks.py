"""What the ranks of tensor parallelism, which decide alike, have to agree on."""

from __future__ import annotations

import torch


def first_of_tensor_parallel() -> bool:
    """All ranks decide alike; one of them reports."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def on_all_ranks(condition: bool) -> bool:
    """Whether it holds on every rank of this tensor parallel group; all of them must ask."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return condition
    holds = torch.tensor([int(condition)])
    torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(holds)
