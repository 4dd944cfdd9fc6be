"""Weak and strong experts on graphs (Mowst, arXiv 2311.05185): the graph is read where its nodes alone do not tell.

The weak expert, a network of a node's own features, answers where it is sure, a graph network elsewhere, and that one
reads no more of the graph than its answers need.

The paper's text, not its repository, is what is here: dispersions are of one softmax in training and inference alike,
the confidence can train the weak expert, and gate and experts are one module, saved together.

Shapes: `N` nodes, `M` directed edges `(from, to)`, `C` classes, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss, softplus

from carpool.errors import CarpoolError
from carpool.models.confidence import negentropy, variance

PARTS = ("weak", "strong", "both")


class Confidence(torch.nn.Module):
    """Mowst's `C = G(D)`: in (0, 1), rising in each dispersion of the weak expert's distribution, trained with it.

    `G` is a layer of `width` units whose weights are 0 or more by construction; the paper's is not bound to rise.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first_2W = torch.nn.Parameter(torch.randn(2, width))
        self.shift_W = torch.nn.Parameter(torch.zeros(width))
        self.second_W = torch.nn.Parameter(torch.zeros(width))
        self.shift = torch.nn.Parameter(torch.tensor(-width * softplus(torch.tensor(0.0)).item() / 2))

    def forward(self, logits_NC: Tensor) -> Tensor:
        """`[N]`, of the weak expert's logits: the one softmax is here."""
        p_NC = logits_NC.softmax(-1)
        return self.of(torch.stack([variance(p_NC), negentropy(p_NC)], dim=-1).to(logits_NC.dtype))

    def of(self, signals_N2: Tensor) -> Tensor:
        """`[N]`, of both dispersions."""
        inner_NW = torch.tanh(signals_N2 @ softplus(self.first_2W) + self.shift_W)
        return (inner_NW @ softplus(self.second_W) + self.shift).sigmoid()


class Mowst(torch.nn.Module):
    """Both experts and the confidence between them.

    Attributes:
        weak: `x_NF` to logits `[N, C]`.
        strong: `x_NF` and what `forward` is given beside it to logits `[N, C]`: any graph network.
        through: whether the weak expert learns through its confidence (the paper's dynamics), or only the gate does
            (its repository's).
    """

    def __init__(self, weak: torch.nn.Module, strong: torch.nn.Module, *, through: bool = True) -> None:
        super().__init__()
        self.weak, self.strong, self.confidence, self.through = weak, strong, Confidence(), through

    def forward(self, x_NF: Tensor, *graph: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both, `[N, C]`, and the confidence in the weak one, `[N]`."""
        weak_NC, confidence_N = self.sure(x_NF)
        return weak_NC, self.strong(x_NF, *graph), confidence_N

    def sure(self, x_NF: Tensor) -> tuple[Tensor, Tensor]:
        """The weak expert's logits and the confidence in them; of any nodes."""
        weak_NC = self.weak(x_NF)
        return weak_NC, self.confidence(weak_NC if self.through else weak_NC.detach())

    def turn(self, part: str) -> list[torch.nn.Parameter]:
        """Whose turn it is to train: `weak` (and its confidence), `strong`, or `both`; the other one is frozen, in
        evaluation mode. Returns the parameters to train. Raises CarpoolError for another word."""
        if part not in PARTS:
            raise CarpoolError(f"no turn of {part!r}; there are {', '.join(PARTS)}")
        turns = {"weak": self.weak, "strong": self.strong, "confidence": self.confidence}
        trained = []
        for name, module in turns.items():
            on = part == "both" or part == ("strong" if name == "strong" else "weak")
            module.train(on).requires_grad_(on)
            trained += [one for one in module.parameters() if on]
        return trained


def mowst_loss(weak_NC: Tensor, strong_NC: Tensor, confidence_N: Tensor, class_N: Tensor) -> Tensor:
    """The experts' own losses, weighted by the confidence (the paper's `L_Mowst`; trained in turns)."""
    weak_N, strong_N = (cross_entropy(one_NC, class_N, reduction="none") for one_NC in (weak_NC, strong_NC))
    return (confidence_N * weak_N + (1 - confidence_N) * strong_N).mean()


def mowst_star_loss(weak_NC: Tensor, strong_NC: Tensor, confidence_N: Tensor, class_N: Tensor) -> Tensor:
    """The loss of the mixed distribution (`L_Mowst*`; trained jointly): never above `mowst_loss`, by convexity."""
    c_N1 = confidence_N.clamp(1e-7, 1 - 1e-7).unsqueeze(-1)
    told_NC = torch.logaddexp(c_N1.log() + weak_NC.log_softmax(-1), (1 - c_N1).log() + strong_NC.log_softmax(-1))
    return nll_loss(told_NC, class_N)


@dataclass(frozen=True, eq=False)
class NodeAnswers:
    """What a batch of nodes was answered.

    Attributes:
        logits_BC: of the expert whose answer stands.
        passed_B: nodes that the strong expert was asked.
        read: nodes whose features the strong expert read: the union of the fields of the nodes it was asked.
        edges: that it read among them.
    """

    logits_BC: Tensor
    passed_B: Tensor
    read: int
    edges: int


@torch.no_grad()
def answer_nodes(
    weak: Callable[[Tensor], Tensor],
    strong: Callable[..., Tensor],
    keep: Callable[[Tensor], Tensor],
    x_NF: Tensor,
    edges_2M: Tensor,
    nodes_B: Tensor,
    *,
    weight_M: Tensor | None = None,
    hops: int = 2,
) -> NodeAnswers:
    """Answer a batch of nodes: the weak expert all, the strong one those that `keep` passes on, on their field alone.

    Args:
        keep: logits of the weak expert `[B, C]` to where they stand, bool `[B]`, such as a `Gate` on their signals.
        strong: takes features, edges and, where there are any, the edges' weights. What it computes at a node may
            depend on nothing but its field of `hops` edges: a normaliser of degrees (as GCN's) has to be in `weight_M`,
            for nodes at the field's border have lost neighbours.
        nodes_B: indices of the nodes.

    Raises:
        CarpoolError: PyTorch Geometric is missing.
    """
    try:
        from torch_geometric.utils import k_hop_subgraph
    except ImportError:
        raise CarpoolError("graphs need PyTorch Geometric: pip install 'carpool[graphs]'") from None
    logits_BC = weak(x_NF[nodes_B])
    passed_B = ~keep(logits_BC)
    if not bool(passed_B.any()):
        return NodeAnswers(logits_BC, passed_B, 0, 0)
    field_R, inside_2X, place_P, inside_M = k_hop_subgraph(
        nodes_B[passed_B], hops, edges_2M, relabel_nodes=True, num_nodes=len(x_NF)
    )
    graph = [inside_2X] if weight_M is None else [inside_2X, weight_M[inside_M]]
    logits_BC = logits_BC.clone()
    logits_BC[passed_B] = strong(x_NF[field_R], *graph)[place_P]
    return NodeAnswers(logits_BC, passed_B, len(field_R), inside_2X.shape[1])
