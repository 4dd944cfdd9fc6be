"""A request in a group of its own does not depend on the others, whatever runs beside it."""

from __future__ import annotations

import pytest
import torch

from carpool import Batch, RouteSpec, parse, route

EXPERTS, TOP_K = 12, 3
POLICIES = ["xshare(budget=3)", "xshare(4, utility='squared') | floor(0.3)", "oea(1)", "des_vote(size=4)", "lynx(3)",
            "random(3)", "xshare(budget=3) | short_circuit | protect([2])"]  # fmt: skip


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("seed", range(20))
def test_prompts_of_other_requests_are_not_heard(text: str, seed: int) -> None:
    """Rows 0 to 2 are one request that decodes; rows 3 and 4 are another's prompt in the same step."""
    generator = torch.Generator().manual_seed(seed)
    mine, theirs, others = (torch.randn(n, EXPERTS, generator=generator) * 2 for n in (3, 2, 2))
    group_N = torch.tensor([0, 0, 0, 1, 1])
    batch = Batch.of(5, group_N=group_N, num_groups=2, exempt_N=group_N == 1)
    spec = RouteSpec(top_k=TOP_K)
    first, second = (route(parse(text), spec, torch.cat((mine, rest)), batch) for rest in (theirs, others))
    assert torch.equal(first.routing.ids_NK[:3], second.routing.ids_NK[:3])
    assert torch.equal(first.routing.weights_NK[:3], second.routing.weights_NK[:3])
    assert torch.equal(first.coreset_GE[0], second.coreset_GE[0])
