"""What cannot be shared: families of transformers, each with the reason, and experts that other processes hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.expert_parallel import ranks_of, require_dispatch


@dataclass(frozen=True)
class Refusal:
    """Why a family is refused: `reason` ends the sentence "Carpool does not share FAMILY: ..."."""

    family: str
    reason: str


REFUSED: dict[str, Refusal] = {
    "PhimoeTopKRouter": Refusal(
        "phimoe", "it weighs each expert among those near the best logit of its round, not by one score for all experts"
    ),
    "ZayaRouter": Refusal("zaya", "one of its choices is to skip the layer, which is no expert that could be shared"),
    "InklingTopkRouter": Refusal(
        "inkling", "routed and shared experts divide one weight, so other experts would change the shared ones' part"
    ),
    "JetMoeTopKGating": Refusal("jetmoe", "its router hands over sorted rows, and its attention has experts too"),
    "DbrxRouter": Refusal("dbrx", "its block chooses and weighs experts itself, after the router"),
    "JambaSparseMoeBlock": Refusal("jamba", "its block chooses and weighs experts itself, after the router"),
    "Llama4Router": Refusal("llama4", "transformers runs all of its experts on every token: there is nothing to save"),
    "DeepseekV4HashRouter": Refusal("deepseek_v4", "token ids, not scores, choose the experts of its first layers"),
    "DogeCDMoE": Refusal("doge", "its experts are rows of an embedding, picked by product keys"),
    "NllbMoeTop2Router": Refusal("nllb_moe", "its experts have a capacity, and the router drops tokens beyond it"),
    "SwitchTransformersTop1Router": Refusal(
        "switch_transformers", "its experts have a capacity, and the router drops tokens beyond it"
    ),
    "VitPoseBackboneMoeMLP": Refusal("vitpose_backbone", "the data set, not a router, chooses its experts"),
}


def refuse(model: nn.Module) -> None:
    """Raises CarpoolError if a module of the model is of a refused class; names the module, family and reason."""
    for name, module in model.named_modules():
        refusal = REFUSED.get(type(module).__name__)
        if refusal is not None:
            raise CarpoolError(
                f"Carpool does not share {refusal.family}: {refusal.reason} ({name}: {type(module).__name__}); "
                "run this model without a policy, or one of the families in docs/families.md with it"
            )


def refuse_spread(model: nn.Module, parts: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises CarpoolError where other processes hold some of the experts, or of a router's rows, unless tokens are sent
    to them after the router chose.

    Args:
        parts: routers and experts modules, each with the name of its layer.
    """
    from torch.distributed.tensor import DTensor

    require_dispatch(model)
    if ranks_of(model) > 1:
        return
    for where, part in parts:
        for name, parameter in part.named_parameters():
            if isinstance(parameter, DTensor) and any(place.is_shard(0) for place in parameter.placements):
                raise CarpoolError(
                    f"{where}: {name} of its {type(part).__name__} is spread over {parameter.device_mesh.size()} "
                    "processes, whose rows and experts Carpool does not see; load the model without expert parallelism"
                )
