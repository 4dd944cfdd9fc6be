"""Families of transformers that cannot be shared, each with the reason: found by the name of a router or a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from carpool.errors import CarpoolError


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
