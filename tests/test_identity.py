"""What names a model: its routers, its counts and a sample of its experts' weights, the same on every host."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, MORE, tiny_model, tokens

import carpool
from carpool import CarpoolError
from carpool.artefacts.identity import ENTRIES, SAMPLES, SIGNED, Held, differs, fingerprint, sample
from carpool.calibrate import calibrate
from carpool.hosts.transformers import find_layers, identity
from carpool.hosts.transformers.plans import prepare
from carpool.plans.grammar import parse
from carpool.plans.policy_file import PolicyFile

E, H, I = 6, 10, 8  # noqa: E741


def weights(seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    into, out = torch.randn(E, 2 * I, H, generator=generator), torch.randn(E, H, I, generator=generator)
    return into.to(dtype), out.to(dtype)


def test_fingerprint():
    weights = {0: torch.randn(4, 8), 3: torch.randn(4, 8)}
    name = fingerprint(weights.items())
    assert name == fingerprint(reversed(list(weights.items())))
    assert name == fingerprint((index, weight.bfloat16()) for index, weight in weights.items())
    assert name != fingerprint([(0, weights[3]), (3, weights[0])])
    assert name != fingerprint([(0, weights[0]), (2, weights[3])])
    assert name != fingerprint([(0, weights[0].view(8, 4)), (3, weights[3])])
    assert name != fingerprint([(0, weights[0])])
    for bad in ([], [(0, weights[0]), (0, weights[0])], [(0, torch.ones(3))]):
        with pytest.raises(CarpoolError):
            fingerprint(bad)


def test_a_sample_holds_weights_of_every_expert_that_no_dtype_or_layout_changes():
    into, out = weights()
    found = sample(3, Held(into, out, I)).tensors
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {name: [E, ENTRIES] for name in SAMPLES}
    for expert in range(E):
        first, last = (into[expert, row].tolist() for row in (0, -1))
        taken = found["sample_in"][expert].tolist()
        assert set(taken[: ENTRIES // 2]) <= set(first)
        assert set(taken[ENTRIES // 2 :]) <= set(last)
        assert set(found["sample_out"][expert].tolist()) <= set(out[expert].flatten().tolist())
    rows = torch.cat([torch.zeros(1), 1 + torch.randperm(2 * I - 2), torch.tensor([2.0 * I - 1])]).long()
    for held in (
        Held(into.float(), out.float(), I),
        Held(into.mT.contiguous().mT, out.mT.contiguous().mT, I),
        Held(into[:, rows], out, I),  # gate and up in another order
        Held(torch.nn.functional.pad(into, (0, 5)), torch.nn.functional.pad(out, (0, 0, 0, 5)), I, hidden_size=H),
    ):
        assert not differs(found, sample(3, held))
    assert differs(found, sample(4, Held(into, out, I)))  # other places
    assert differs(found, sample(3, Held(into, out.mT, H)))
    assert differs(found, sample(3, Held(into, out[:5], I))) == "it has 6 experts with weights, not 5"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_see_their_part_and_together_all(world):
    into, out = weights()
    found, seen = sample(0, Held(into, out, I)).tensors, dict.fromkeys(SAMPLES, 0)
    gate, up = into.chunk(2, dim=1)
    size = I // world
    for rank in range(world):
        mine = slice(rank * size, (rank + 1) * size)
        held = Held(torch.cat([gate[:, mine], up[:, mine]], 1), out[..., mine], I, first=rank * size)
        part = sample(0, held)
        assert not differs(found, part)
        for name, tensor in part.tensors.items():
            seen[name] += int((~tensor.isnan()).sum())
        held.out_EHI.neg_()
        assert "weights out of 6 of its experts differ" in differs(found, sample(0, held))
        held.out_EHI.neg_()
    assert seen == dict.fromkeys(SAMPLES, E * ENTRIES)


def test_ranks_with_some_of_the_experts():
    into, out = weights()
    found = sample(0, Held(into, out, I)).tensors
    places = torch.tensor([-1, 1, -1, 0, -1, -1])
    part = sample(0, Held(into[[3, 1]], out[[3, 1]], I, places=places))
    assert not differs(found, part)
    assert (~part.tensors["sample_out"].isnan()).all(1).tolist() == [False, True, False, True, False, False]
    wrong = sample(0, Held(into[[3, 1]], out[[1, 3]], I, places=places))
    assert "weights out of 2 of its experts differ, such as expert 1's" in differs(found, wrong)


@pytest.mark.parametrize("dtype", [kind for kind in SIGNED if "uz" not in str(kind)], ids=str)
def test_of_quantised_weights_the_signs_are_compared(dtype):
    into, out = weights()
    found, scale = sample(0, Held(into, out, I)).tensors, 30 if dtype == torch.int8 else 1
    small = [(part.float() * scale).clamp(-120, 120).to(dtype) for part in (into, out)]
    assert not differs(found, sample(0, Held(*small, I)))
    for other in (weights(1), [-part for part in (into, out)]):
        other = [(part.float() * scale).clamp(-120, 120).to(dtype) for part in other]
        assert "another sign" in differs(found, sample(0, Held(*other, I)))


@pytest.mark.parametrize(
    ("out", "cause"),
    [
        (torch.zeros(E, H, I, dtype=torch.uint8), "weights of torch.uint8"),
        (torch.zeros(E, H, I, device="meta"), "not in memory"),
        (torch.zeros(E, H * I), "weights of torch.float32"),
    ],
)
def test_weights_that_cannot_be_seen(out, cause):
    found = sample(0, Held(None, out, I))
    assert not found.tensors
    assert cause in found.hidden


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_is_sampled(family):
    model = tiny_model(family)
    mine = identity(find_layers(model))
    for layer in find_layers(model):
        found = mine.samples[layer.index].tensors
        assert set(found) == set(SAMPLES)
        parameters = {n: set(p.bfloat16().flatten().tolist()) for n, p in layer.experts.named_parameters()}
        into = parameters.get("gate_up_proj") or parameters["up_proj"]
        assert set(found["sample_in"].flatten().tolist()) <= into
        assert set(found["sample_out"].flatten().tolist()) <= parameters["down_proj"]
    assert mine.hidden_size == 32


@pytest.fixture(scope="module")
def stats():
    model = tiny_model("qwen3_moe")
    return calibrate(model, find_layers(model), tokens(rows=16, length=24))


def negated(model):
    for layer in find_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data.neg_()


def tuned(model):
    """A step of fine-tuning that reaches one expert and no router."""
    experts = find_layers(model)[1].experts
    model.train()(tokens(), labels=tokens(seed=2)).loss.backward()
    for parameter in experts.parameters():
        parameter.data[5] -= 1e-2 * parameter.grad[5].sign()
    model.eval()


def tuned_on_its_way_in(model):
    find_layers(model)[0].experts.gate_up_proj.data[3] *= 1.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (negated, "in layer 0 weights into 8 of its experts differ"),
        (tuned, "in layer 1 weights into 1 of its experts differ, such as expert 5's"),
        (tuned_on_its_way_in, "in layer 0 weights into 1 of its experts differ, such as expert 3's"),
    ],
)
def test_statistics_of_other_experts_behind_the_same_routers_are_refused(stats, change, said):
    model = tiny_model("qwen3_moe")
    stats.check(identity(find_layers(model)))
    change(model)
    with (
        pytest.raises(
            CarpoolError,
            match=f"another model with the same routers: {said}.*run `carpool calibrate MODEL -o stats.safetensors`",
        ),
        carpool.share(model, "sere(top=1)", stats=stats),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_taken_in_every_precision(stats, dtype):
    assert not stats.check(identity(find_layers(tiny_model("qwen3_moe").to(dtype))))


def test_what_cannot_be_compared_is_said_once(stats, caplog):
    model = tiny_model("qwen3_moe")
    experts = find_layers(model)[1].experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.to(torch.uint8), requires_grad=False)
    said = stats.check(identity(find_layers(model)))
    assert said.startswith(
        "the experts of 1 of 2 layers could not be compared with the statistics (layer 1: weights of"
    )
    for _ in range(2):
        prepare(PolicyFile(parse("sere(top=1)")), find_layers(model), stats, None, [1.0, 1.0])
    assert [record.message for record in caplog.records] == [said]


class Sharded(torch.Tensor):
    """A tensor whose numbers are elsewhere."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda down: down.as_subclass(Sharded), "weights of the class Sharded"),
        (lambda down: down[..., ::2].to(torch.int8), "Qwen3MoeExperts with packed weights of torch.int8"),
        (lambda down: down.flatten(), "Qwen3MoeExperts without a plain down_proj"),
    ],
)
def test_weights_of_other_kinds_are_not_looked_into(change, said):
    layer = find_layers(tiny_model("qwen3_moe"))[0]
    down = change(layer.experts.down_proj.data)
    del layer.experts.down_proj
    layer.experts.register_parameter("down_proj", torch.nn.Parameter(down, requires_grad=False))
    assert layer.sample().hidden == said


def test_offloaded_weights_are_looked_up(stats, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    held = accelerate.cpu_offload(copy.deepcopy(tiny_model("qwen3_moe")))
    assert find_layers(held)[0].experts.down_proj.is_meta
    assert not differs(stats.layers[0], find_layers(held)[0].sample())
    on_disk = accelerate.disk_offload(copy.deepcopy(tiny_model("qwen3_moe")), str(tmp_path))
    assert not differs(stats.layers[1], find_layers(on_disk)[1].sample())
