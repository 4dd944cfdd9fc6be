"""Experts on a graph and how they are trained: a network of a node's own features, graph networks, both forms of Mowst.

All of them have as many steps on the graph, at the most, and the same settings to choose from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch_geometric.nn import GCNConv, SAGEConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from carpool.models.graphs import Mowst, mowst_loss, mowst_star_loss

WIDTH, DECAY = 64, 5e-4
STEPS, EVERY, PATIENCE = 60, 5, 4  # on the graph, at the most; steps between looks; looks without a gain
TURNS = 4  # of Mowst's experts, after a first training of each alone


class Own(torch.nn.Module):
    """A node's own features."""

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(features, WIDTH), torch.nn.Linear(WIDTH, classes)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x_NF: Tensor, *graph: Any) -> Tensor:
        return self.second(self.dropout(self.first(self.dropout(x_NF)).relu()))


class Graph(torch.nn.Module):
    """Two layers of GCN (its normaliser is in the edges' weights) or SAGE."""

    def __init__(self, kind: str, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        made = {"gcn": lambda *sizes: GCNConv(*sizes, normalize=False), "sage": SAGEConv}[kind]
        self.first, self.second = made(features, WIDTH), made(WIDTH, classes)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x_NF: Tensor, *graph: Any) -> Tensor:
        return self.second(self.dropout(self.first(self.dropout(x_NF), *graph).relu()), *graph)


class Skip(torch.nn.Module):
    """The control: both experts' logits, added."""

    def __init__(self, own: Own, graph: Graph) -> None:
        super().__init__()
        self.own, self.graph = own, graph

    def forward(self, x_NF: Tensor, *graph: Any) -> Tensor:
        return self.own(x_NF) + self.graph(x_NF, *graph)


@dataclass
class Data:
    """A graph with one split of its nodes: half to train on, a quarter to choose by, a quarter to judge on.

    Attributes:
        plain_2M: edges as they are, which SAGE averages over. edges_2M, weight_M: with loops and GCN's normaliser.
    """

    x_NF: Tensor
    class_N: Tensor
    plain_2M: Tensor
    edges_2M: Tensor
    weight_M: Tensor
    train_N: Tensor
    choose_N: Tensor
    judge_N: Tensor

    @classmethod
    def load(cls, work: Path, split: int, edges: str = "edges") -> Data:
        found = load_file(work / "graph.safetensors")
        nodes = len(found["class"])
        edges_2M, weight_M = gcn_norm(found[edges], None, nodes, add_self_loops=True)
        part_N = torch.randperm(nodes, generator=torch.Generator().manual_seed(split)) % 4
        return cls(found["x"], found["class"], found[edges], edges_2M, weight_M, part_N < 2, part_N == 2, part_N == 3)

    @property
    def classes(self) -> int:
        return int(self.class_N.max()) + 1

    def sparse(self, kind: str) -> Tensor:
        """Rows are where edges end."""
        edges_2M, weight_M = self.graph(kind)
        weight_M = torch.ones(edges_2M.shape[1]) if weight_M is None else weight_M
        size = (len(self.x_NF), len(self.x_NF))
        return (
            torch.sparse_coo_tensor(edges_2M.flip(0), weight_M, size, check_invariants=True).coalesce().to_sparse_csr()
        )

    def graph(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """Edges and weights of one kind of network."""
        return (self.edges_2M, self.weight_M) if kind == "gcn" else (self.plain_2M, None)


@dataclass(frozen=True)
class Setting:
    rate: float
    dropout: float


def search(
    module: torch.nn.Module, trained: list[torch.nn.Parameter], loss: Callable[[Tensor], Tensor], data: Data,
    setting: Setting, steps: int,
) -> None:  # fmt: skip
    """Train until the loss on the nodes to choose by no longer falls; the module ends in its best state, evaluating.

    Args:
        loss: over some nodes, a mask `[N]`.
    """
    optimizer = torch.optim.Adam(trained, lr=setting.rate, weight_decay=DECAY)
    training = {name: part.training for name, part in module.named_modules()}  # a frozen expert keeps evaluating
    best, state, waited = math.inf, copy.deepcopy(module.state_dict()), 0
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(data.train_N).backward()
        optimizer.step()
        if step % EVERY:
            continue
        module.eval()
        with torch.no_grad():
            found = float(loss(data.choose_N))
        for name, part in module.named_modules():
            part.training = training[name]
        waited += 1
        if found < best:
            best, state, waited = found, copy.deepcopy(module.state_dict()), 0
        if waited == PATIENCE:
            break
    module.load_state_dict(state)
    module.eval()


def alone(data: Data, model: torch.nn.Module, kind: str, setting: Setting, steps: int = STEPS) -> torch.nn.Module:
    """One expert on its own."""
    adjacency = data.sparse(kind)

    def loss(part_N: Tensor) -> Tensor:
        return cross_entropy(model(data.x_NF, adjacency)[part_N], data.class_N[part_N])

    search(model.train(), list(model.parameters()), loss, data, setting, steps)
    return model


def made(data: Data, kind: str, setting: Setting) -> torch.nn.Module:
    sizes = data.x_NF.shape[1], data.classes, setting.dropout
    if kind == "mlp":
        return Own(*sizes)
    return Skip(Own(*sizes), Graph("gcn", *sizes)) if kind == "skip" else Graph(kind, *sizes)


def mowst(data: Data, setting: Setting, *, star: bool, through: bool) -> Mowst:
    """Both experts and their gate: jointly (`star`), or each alone first and then in turns."""
    weak, strong = made(data, "mlp", setting), made(data, "gcn", setting)
    model, adjacency, x_NF = Mowst(weak, strong, through=through), data.sparse("gcn"), data.x_NF
    if star:

        def joint(part_N: Tensor) -> Tensor:
            weak_NC, confidence_N = model.sure(x_NF[part_N])
            return mowst_star_loss(weak_NC, strong(x_NF, adjacency)[part_N], confidence_N, data.class_N[part_N])

        search(model, model.turn("both"), joint, data, setting, STEPS)
        return model
    alone(data, weak, "gcn", setting)
    alone(data, strong, "gcn", setting, STEPS // 2)
    for turn in range(TURNS):
        part = ("weak", "strong")[turn % 2]
        trained = model.turn(part)
        with torch.no_grad():
            fixed = model(x_NF, adjacency)  # of the expert whose turn it is not

        def loss(part_N: Tensor, part: str = part, fixed: tuple[Tensor, ...] = fixed) -> Tensor:
            weak_NC, strong_NC, confidence_N = (one[part_N] for one in fixed)
            if part == "strong":
                strong_NC = strong(x_NF, adjacency)[part_N]
            else:
                weak_NC, confidence_N = model.sure(x_NF[part_N])
            return mowst_loss(weak_NC, strong_NC, confidence_N, data.class_N[part_N])

        search(model, trained, loss, data, setting, STEPS // 4 if part == "strong" else STEPS)
    return model
