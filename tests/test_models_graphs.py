"""Mowst: its losses and confidence, who learns in whose turn, and that no more of a graph is read than answers need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from carpool import CarpoolError
from carpool.models.confidence import negentropy, variance
from carpool.models.graphs import Confidence, Mowst, answer_nodes, mowst_loss, mowst_star_loss

seeds = st.integers(0, 999)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def a_confidence(seed: int = 0) -> Confidence:
    torch.manual_seed(seed)
    made = Confidence()
    for one in made.parameters():
        torch.nn.init.normal_(one)
    return made


@given(seeds, st.integers(0, 1))
def test_confidence_rises_with_each_dispersion(seed: int, which: int) -> None:
    signals_N2 = torch.rand(30, 2, generator=torch.Generator().manual_seed(seed))
    more_N2 = signals_N2.clone()
    more_N2[:, which] += 0.1 + signals_N2[:, 1 - which]
    confidence = a_confidence(seed)
    assert (confidence.of(more_N2) >= confidence.of(signals_N2)).all()
    assert (confidence.of(more_N2) > confidence.of(signals_N2)).any()


@given(seeds)
def test_confidence_is_of_one_softmax_in_training_and_afterwards(seed: int) -> None:
    """A second softmax makes a five-class 0.976 into 0.064, and goes unseen where training has only one."""
    logits_NC, confidence = drawn(seed, 9, 5), a_confidence(seed)
    p_NC = torch.tensor(logits_NC.tolist(), dtype=torch.float64).softmax(-1)
    by_hand_N = confidence.of(torch.stack([variance(p_NC), negentropy(p_NC)], dim=-1).float())
    for training in (True, False):
        torch.testing.assert_close(confidence.train(training)(logits_NC), by_hand_N)
    twice_N = confidence(logits_NC.softmax(-1))
    assert not torch.allclose(twice_N, by_hand_N, atol=1e-3)


@given(seeds, st.integers(2, 8))
def test_losses_by_hand_and_the_joint_one_is_never_more(seed: int, classes: int) -> None:
    weak_NC, strong_NC = drawn(seed, 7, classes), drawn(seed + 1, 7, classes)
    c_N = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    class_N = torch.arange(7) % classes
    apart = joint = 0.0
    for n, which in enumerate(class_N.tolist()):
        weak, strong, c = float(weak_NC[n].softmax(-1)[which]), float(strong_NC[n].softmax(-1)[which]), float(c_N[n])
        apart -= (c * torch.tensor(weak).log() + (1 - c) * torch.tensor(strong).log()) / 7
        joint -= torch.tensor(c * weak + (1 - c) * strong).log() / 7
    given_all = (weak_NC, strong_NC, c_N, class_N)
    assert float(mowst_loss(*given_all)) == pytest.approx(float(apart), rel=1e-4)
    assert float(mowst_star_loss(*given_all)) == pytest.approx(float(joint), rel=1e-4)
    assert float(mowst_star_loss(*given_all)) <= float(mowst_loss(*given_all)) + 1e-5


def a_mowst(through: bool = True) -> Mowst:
    torch.manual_seed(0)
    dropout = torch.nn.Dropout(0.5)
    return Mowst(torch.nn.Linear(6, 4), torch.nn.Sequential(dropout, torch.nn.Linear(6, 4)), through=through)


@pytest.mark.parametrize("through", [True, False])
def test_the_weak_expert_learns_through_its_confidence_or_does_not(through: bool) -> None:
    model = a_mowst(through)
    _, _, confidence_N = model(drawn(0, 5, 6))
    confidence_N.sum().backward()
    assert (model.weak.weight.grad is not None) == through
    assert model.confidence.shift.grad is not None


def test_only_who_has_the_turn_is_trained() -> None:
    model, x_NF, class_N = a_mowst(), drawn(0, 8, 6), torch.arange(8) % 4
    for part, trained in (
        ("weak", {"weak", "confidence"}),
        ("strong", {"strong"}),
        ("both", {"weak", "strong", "confidence"}),
    ):
        parameters = model.turn(part)
        mowst_loss(*model(x_NF), class_N).backward()
        assert {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad} == trained
        assert {id(one) for one in parameters} == {id(one) for one in model.parameters() if one.grad is not None}
        assert model.strong.training == ("strong" in trained), "a frozen expert drops nothing out"
        model.zero_grad()
    with pytest.raises(CarpoolError, match="no turn of 'gate'; there are weak, strong, both"):
        model.turn("gate")


def test_the_gate_is_saved_with_its_experts(tmp_path: Path) -> None:
    model, x_NF = a_mowst().eval(), drawn(0, 8, 6)
    torch.nn.init.normal_(model.confidence.second_W)
    save_file(model.state_dict(), tmp_path / "mowst.safetensors")
    other = a_mowst().eval()
    other.load_state_dict(load_file(tmp_path / "mowst.safetensors"))
    for one, again in zip(model(x_NF), other(x_NF), strict=True):
        assert torch.equal(one, again)


class Conv(torch.nn.Module):
    """Two layers of PyTorch Geometric's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        nn = pytest.importorskip("torch_geometric.nn")
        made = nn.SAGEConv if kind == "sage" else lambda *sizes: nn.GCNConv(*sizes, normalize=kind == "own normaliser")
        self.first, self.second = made(6, 5), made(5, 4)

    def forward(self, x_NF: Tensor, *graph: Tensor) -> Tensor:
        return self.second(self.first(x_NF, *graph).relu(), *graph)


def a_graph(seed: int, nodes: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    edges_2M = torch.randint(nodes, (2, nodes), generator=generator)
    return torch.cat([edges_2M, edges_2M.flip(0)], dim=1).unique(dim=1)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("seed", range(4))
def test_reading_only_fields_is_reading_the_whole_graph(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    weak, strong, x_NF, edges_2M = torch.nn.Linear(6, 4), Conv(kind), drawn(seed, 40, 6), a_graph(seed)
    weight_M = None
    if kind == "gcn":
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        edges_2M, weight_M = gcn_norm(edges_2M, None, 40, add_self_loops=True)
    nodes_B = torch.randperm(40)[:6]

    def keep(logits_BC: Tensor) -> Tensor:
        return logits_BC[:, 0] > logits_BC[:, 0].median()

    made = answer_nodes(weak, strong, keep, x_NF, edges_2M, nodes_B, weight_M=weight_M)
    whole_NC = strong(x_NF, *([edges_2M] if weight_M is None else [edges_2M, weight_M]))[nodes_B]
    assert made.passed_B.tolist() == (~keep(weak(x_NF[nodes_B]))).tolist()
    assert 0 < int(made.passed_B.sum()) < 6
    torch.testing.assert_close(made.logits_BC[made.passed_B], whole_NC[made.passed_B])
    assert torch.equal(made.logits_BC[~made.passed_B], weak(x_NF[nodes_B])[~made.passed_B])
    field = set(nodes_B[made.passed_B].tolist())
    for _ in range(2):
        field |= {a for a, b in edges_2M.T.tolist() if b in field}
    assert made.read == len(field) < 40
    assert made.edges == sum(a in field and b in field for a, b in edges_2M.T.tolist())


def test_a_normaliser_of_degrees_does_not_see_past_the_border() -> None:
    """Why GCN's is given with the edges: on a field alone it counts fewer neighbours than there are."""
    x_NF, edges_2M, strong = drawn(0, 40, 6), a_graph(0), Conv("own normaliser")
    made = answer_nodes(
        torch.nn.Linear(6, 4), strong, lambda one: one[:, 0] > torch.inf, x_NF, edges_2M, torch.arange(3)
    )
    assert not torch.allclose(made.logits_BC, strong(x_NF, edges_2M)[:3], atol=1e-4)


def test_where_all_stand_nothing_is_read() -> None:
    pytest.importorskip("torch_geometric")
    weak = torch.nn.Linear(6, 4)
    made = answer_nodes(
        weak, Conv("sage"), lambda one: one[:, 0] < torch.inf, drawn(0, 40, 6), a_graph(0), torch.arange(9)
    )
    assert (made.read, made.edges, bool(made.passed_B.any())) == (0, 0, False)
