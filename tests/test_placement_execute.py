"""A MoE layer under a placement on 2 and 4 ranks: outputs, gradients, what is sent, as one process and planners say."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from placement_tools import random_trace
from ranks import run_ranks

from carpool import CarpoolError
from carpool.placement.baselines import linear, random
from carpool.placement.demand import loads_LE
from carpool.placement.dispatch import rows_sent
from carpool.placement.eplb import eplb
from carpool.placement.execute.layer import PlacedExperts, spill
from carpool.placement.execute.sharded import ShardedExperts
from carpool.placement.execute.weights import Weights, mixed
from carpool.placement.llep import least_loaded
from carpool.placement.replicas import device_NK

EXPERTS, HIDDEN, WIDTH, TOP_K, ROWS = 8, 6, 8, 3, 22
TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 3e-2}


def layer_weights(dtype):
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
    return Weights(gate_up.to(dtype) / 2, down.to(dtype) / 2)


def step(dtype, skew=1.0):
    """Hidden states, choices and weights of one step; some slots are free, and one expert is the most popular."""
    generator = torch.Generator().manual_seed(2)
    hidden_NH = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    scores_NE = torch.randn(ROWS, EXPERTS, generator=generator, dtype=torch.float64)
    scores_NE[:, 1] += skew
    weights_NK, ids_NK = scores_NE.softmax(-1).topk(TOP_K, -1)
    weights_NK[::5, -1] = 0
    return hidden_NH, ids_NK, weights_NK.to(dtype)


def owned(rank, ranks):
    """Rows are at home on the ranks in turn; the last rank has none."""
    home_N = torch.arange(ROWS) % max(1, ranks - 1)
    return (home_N == rank).nonzero().flatten(), home_N


def placements(ranks):
    load_LE = loads_LE(random_trace(200, 1, EXPERTS, TOP_K, seed=4, skew=2.0))
    return {"linear": linear(1, EXPERTS, ranks), "random": random(1, EXPERTS, ranks, seed=3),
            "replicas": eplb(load_LE, ranks, redundant=ranks)}  # fmt: skip


def cases(ranks):
    """Name, and what makes the layer."""
    given = placements(ranks)
    found = {
        f"{name} {dispatch} {rule}": (placement, {"dispatch": dispatch, "rule": rule})
        for name, placement in given.items()
        for dispatch in ("allgather", "deepep", "alltoall")
        for rule in (("hash", "metro") if name == "replicas" else ("hash",))
    }
    balance = spill(alpha=1.0, least=1, ratio=1.0)
    found |= {f"llep {d}": (given["linear"], {"dispatch": d, "balance": balance}) for d in ("deepep", "allgather")}
    return {**found, "sharded": (None, {})}


def run_all(dtype):
    """On a rank: by case the outputs, gradients by expert, and what was sent."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own_R, _ = owned(rank, ranks)
    results = {}
    for name, (placement, how) in cases(ranks).items():
        weights = layer_weights(dtype)
        layer = ShardedExperts(weights) if placement is None else PlacedExperts(weights, placement, **how)
        hidden_NH, ids_NK, weights_NK = step(dtype)
        mine = [one[own_R].clone().requires_grad_(one.is_floating_point()) for one in (hidden_NH, ids_NK, weights_NK)]
        place = {} if placement is None else {"place_N": own_R}
        out_NH = layer(*mine, **place)
        (out_NH * torch.arange(1, HIDDEN + 1)).sum().backward()
        results[name] = {
            "out": out_NH.detach(), "hidden": mine[0].grad, "weights": mine[2].grad,
            "gate_up": layer.gate_up.grad, "down": layer.down.grad, "own": getattr(layer, "own_S", None),
            "rows": dict(layer.ranks.traffic.rows), "bytes": dict(layer.ranks.traffic.bytes),
            "computed": getattr(layer, "computed_E", None),
        }  # fmt: skip
    return results


def alone(dtype):
    weights = layer_weights(dtype)
    gate_up, down = weights.gate_up.requires_grad_(), weights.down.requires_grad_()
    hidden_NH, ids_NK, weights_NK = step(dtype)
    hidden_NH, weights_NK = hidden_NH.requires_grad_(), weights_NK.requires_grad_()
    out_NH = mixed(weights, torch.arange(EXPERTS), hidden_NH, torch.where(weights_NK == 0, -1, ids_NK), weights_NK)
    (out_NH * torch.arange(1, HIDDEN + 1)).sum().backward()
    return out_NH.detach(), hidden_NH.grad, weights_NK.grad, gate_up.grad, down.grad


def check(ranks, dtype):
    found = run_ranks(run_all, ranks, dtype)
    expected = alone(dtype)
    _, ids_NK, weights_NK = step(dtype)
    asked_NK = weights_NK != 0
    _, home_N = owned(0, ranks)
    token = HIDDEN * dtype.itemsize

    def close(mine, theirs):
        scale = float(theirs.abs().max())
        assert float((mine.double() - theirs.double()).abs().max()) <= TOLERANCE[dtype] * scale

    for name, (placement, how) in cases(ranks).items():
        by_rank = [one[name] for one in found]
        whole = {key: torch.zeros_like(one) for key, one in zip(("out", "hidden", "weights"), expected, strict=False)}
        for rank, one in enumerate(by_rank):
            for key, tensor in whole.items():
                tensor[owned(rank, ranks)[0]] = one[key]
        close(whole["out"], expected[0])
        close(whole["hidden"], expected[1])
        close(torch.where(asked_NK, whole["weights"], 0), torch.where(asked_NK, expected[2], 0))
        total = {key: sum(one["rows"].get(key, 0) for one in by_rank) for key in by_rank[0]["rows"]}
        for rank, one in enumerate(by_rank):
            assert one["bytes"]["rows"] == one["rows"]["rows"] * token, (name, rank)
        assert total["results"] == total["rows"] == total["gradients of results"] == total["gradients of rows"]
        if placement is None:
            assert total["rows"] == ROWS * (ranks - 1)
            gate, up = expected[3].chunk(2, 1)
            close(torch.cat([one["gate_up"].chunk(2, 1)[0] for one in by_rank], 1), gate)
            close(torch.cat([one["gate_up"].chunk(2, 1)[1] for one in by_rank], 1), up)
            close(torch.cat([one["down"] for one in by_rank], 2), expected[4])
            continue
        sums = [torch.zeros_like(one) for one in expected[3:]]
        for one in by_rank:
            for place, key in enumerate(("gate_up", "down")):
                sums[place].index_add_(0, one["own"], one[key])
        close(sums[0], expected[3])
        close(sums[1], expected[4])

        # what the planner says
        if "balance" in how:
            tokens_E = ids_NK[asked_NK].bincount(minlength=EXPERTS)
            spilled = least_loaded(tokens_E, placement.device_LE[0], ranks, alpha=1.0, least=1, ratio=1.0)
            assert not spilled.standard
            assert [int(one["computed"].sum()) for one in by_rank] == spilled.loads_D.tolist()
            assert total["experts"] == len(spilled.moves_X2) > 0
            assert sum(one["bytes"]["experts"] for one in by_rank) == total["experts"] * 3 * WIDTH * token
            continue
        zero_N = torch.zeros(ROWS, dtype=torch.int64)
        device = device_NK(ids_NK, asked_NK, placement.holds_LDE[0], zero_N, torch.arange(ROWS), how["rule"])
        assert total["rows"] == rows_sent(how["dispatch"], device, home_N, ranks), name
        for rank, one in enumerate(by_rank):
            computed_E = ids_NK[device == rank].bincount(minlength=EXPERTS)
            assert torch.equal(one["computed"], computed_E), (name, rank)


def test_two_ranks_compute_what_one_process_does():
    check(2, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (4, torch.float64), (4, torch.bfloat16)])
def test_more_ranks_and_fewer_bits(ranks, dtype):
    check(ranks, dtype)


def refusals():
    weights, said = layer_weights(torch.float64), []
    for make in (
        lambda: PlacedExperts(weights, linear(1, EXPERTS, 4)),
        lambda: PlacedExperts(weights, linear(1, 4, 2)),
        lambda: PlacedExperts(weights, linear(1, EXPERTS, 2), dispatch="pigeons"),
        lambda: PlacedExperts(weights, placements(2)["replicas"], balance=spill()),
        lambda: ShardedExperts(Weights(torch.zeros(1, 6, 2), torch.zeros(1, 2, 3))),
    ):
        try:
            make()
        except CarpoolError as error:
            said.append(str(error))
    return said


def lost():
    """Rank 1 ends without a word while rank 0 waits for its rows."""
    layer = PlacedExperts(layer_weights(torch.float64), linear(1, EXPERTS, 2))
    if dist.get_rank() == 1:
        os._exit(0)
    begin = time.monotonic()
    hidden_NH, ids_NK, weights_NK = step(torch.float64)
    try:
        layer(hidden_NH, ids_NK, weights_NK)
    except CarpoolError as error:
        message = str(error)
    print(message, round(time.monotonic() - begin), flush=True)
    os._exit(7 if "rank 0 of 2 could not exchange" in message else 1)


@pytest.mark.slow
def test_impossible_layers_are_refused_and_a_rank_that_ends_is_noticed():
    said = run_ranks(refusals, 2)[0]
    assert [one.partition(":")[0].partition(";")[0] for one in said] == [
        "the placement is for 4 devices, the group has 2 ranks", "the placement places 4 experts, the layer has 8",
        "dispatch 'pigeons'", "LLEP moves experts that lie once", "experts of width 3 do not divide into 2 slices",
    ]  # fmt: skip
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as ended:
        run_ranks(lost, 2)
    assert ended.value.exit_code == 7
