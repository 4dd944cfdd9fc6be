"""A placement of `carpool place` in vLLM: its expert parallelism load balancer puts experts where the placement says.

`--enable-eplb` and `--additional-config '{"carpool_placement": "placement.json"}'`. vLLM asks a policy class for the
map of experts at every rebalancing, on every rank; here it always gets the placement's, which was made off line, so
that ranks cannot differ. It first asks after an interval (`eplb_config.step_interval`); until then experts are in
order.

`L` MoE layers, `R` physical experts, `E` experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from torch import Tensor

PLACEMENT = "carpool_placement"  # key of `additional_config`


def placed(additional_config: Any) -> bool:
    """Whether there is a key `carpool_placement`."""
    return isinstance(additional_config, dict) and PLACEMENT in additional_config


def require_placement(config: Any) -> type | None:
    """The policy of vLLM's configuration, if that names a placement.

    Raises:
        CarpoolError: the placement cannot be read, or vLLM would not ask for it.
    """
    if not placed(config.additional_config):
        return None
    if not config.parallel_config.enable_eplb:
        raise CarpoolError(f"{PLACEMENT}: vLLM moves experts only with --enable-expert-parallel and --enable-eplb")
    return planned(config.additional_config[PLACEMENT])


def use_placement(config: Any) -> None:
    """In a worker, before its model is loaded: vLLM's policy becomes the placement, if its configuration names one;
    raises as `require_placement`."""
    policy = require_placement(config)
    if policy is not None:
        from vllm.distributed.eplb.policy import EPLB_POLICIES

        EPLB_POLICIES[config.parallel_config.eplb_config.policy] = policy


def planned(path: str | Path) -> type:
    """vLLM's kind of policy that always answers with a placement.

    Raises:
        CarpoolError: the file cannot be read. When vLLM asks: its layers, experts, replicas or ranks are others.
    """
    from vllm.distributed.eplb.policy import AbstractEplbPolicy, DefaultEplbPolicy

    from carpool.placement.placement_file import PlacementFile

    if not isinstance(path, str | Path):
        raise CarpoolError(f"{PLACEMENT} is {path!r}; give the path of a placement of `carpool place`")
    placement = PlacementFile.load(path).placement

    class Planned(AbstractEplbPolicy):
        """The placement, whatever the loads are; experts that stay on a rank keep their slots."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Tensor | None = None,
        ) -> Tensor:
            import torch

            mine = (placement.layers, placement.num_experts, placement.devices * placement.slots, placement.devices)
            theirs = (*weight.shape, num_replicas, num_ranks)
            if mine != theirs:
                raise CarpoolError(
                    f"{path} is for {mine[0]} layers of {mine[1]} experts in {mine[2]} places on {mine[3]} ranks, vLLM "
                    f"has {theirs[0]} layers of {theirs[1]} in {theirs[2]} on {theirs[3]}: plan with --devices "
                    f"{theirs[3]} --redundant {theirs[2] - theirs[1]}"
                )
            map_LR = placement.expert_LDS.flatten(1).clone()
            if old_global_expert_indices is None:
                return map_LR
            old_LR = old_global_expert_indices.cpu().numpy()
            kept = DefaultEplbPolicy.preserve_intragpu_slots(map_LR.numpy(), num_ranks, old_LR)
            return torch.from_numpy(kept)

    return Planned
