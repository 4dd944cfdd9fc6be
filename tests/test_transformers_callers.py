"""Every caller of tests/rows_of_callers.py gets the rows that it says, or the refusal."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows_of_callers import CALLERS, PLAN, Caller, World, ids
from tiny_models import tiny_model

import carpool
from carpool import Batch, CarpoolError, Grouping
from carpool.hosts.transformers.batching import Packed
from carpool.hosts.transformers.forward_rows import RowRules, build_batch
from carpool.hosts.transformers.here import Here


def shown(batch: Batch) -> str:
    """A forward in letters."""
    assert batch.request_N is not None
    words = [""] * batch.num_requests
    rows = zip(
        batch.request_N.tolist(), batch.real_N.tolist(), batch.exempt_N.tolist(), batch.voter_N.tolist(), strict=True
    )
    for request, real, exempt, votes in rows:
        words[request] += "." if not real else "p" if exempt else "v" if votes else "e"
    return " ".join(word for word in words if word)


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)
def test_rows(caller: Caller) -> None:
    plain = tiny_model("qwen3_moe")
    with torch.no_grad():
        first_B = plain(ids(3, 5)).logits[:, -1].argmax(-1).tolist()
    seen: list[Batch] = []

    def observe(place: int, batch: Batch, _: Any) -> None:
        if place == 0:
            seen.append(batch)

    def call() -> None:
        model = caller.make(plain)
        options = {"plan": PLAN, "observe": observe, **caller.options}
        with ExitStack() as stack:
            with caller.mode():
                run = stack.enter_context(carpool.share(model, **options))
            caller.act(World(model, run, first_B))

    if caller.refused:
        with pytest.raises(CarpoolError, match=caller.refused):
            call()
        return
    call()
    if caller.timed:
        made, said = ("".join(forwards).replace(" ", "") for forwards in (map(shown, seen), caller.rows))
        assert Counter(made) == Counter(said)
    else:
        assert [shown(batch) for batch in seen] == list(caller.rows)
    if caller.groups:
        assert tuple(seen[-1].group_N.tolist()) == caller.groups


def test_samples_of_a_request_in_a_packed_batch() -> None:
    """By the engine's own name of the request, padding by itself; prompts by how long they are."""
    names = ("req_0__child#0", "req_1", "req_0", "req_1__child#0")
    requests = [
        SimpleNamespace(state=SimpleNamespace(request_id=name, initial_tokens=[1] * length))
        for name, length in zip(names, (4, 6, 4, 6), strict=True)
    ]
    held = SimpleNamespace(requests_in_batch=requests)
    manager = SimpleNamespace(
        batch_processor=SimpleNamespace(inputs_and_outputs=held), _run_generation_loop=lambda: None
    )
    pair = SimpleNamespace(host_io=held)
    loop = Packed(manager, Here())
    ends = torch.tensor([0, 1, 3, 4, 5, 5])
    for inputs in (held, SimpleNamespace(io_pairs=[None, pair], current_pair=1)):
        manager.batch_processor.inputs_and_outputs = inputs
        known = loop.known({"cu_seq_lens_q": ends})
        given = {"input_ids": torch.ones(1, 6).long(), "cu_seq_lens_q": ends}
        given["position_ids"] = torch.tensor([[4, 4, 5, 3, 7, 0]])
        batch = build_batch(RowRules(Grouping.parse("prompt")), (), given, known)
        assert batch.group_N.tolist()[:5] == [0, 1, 1, 0, 1]
        assert batch.exempt_N.tolist() == [False, True, True, True, False, True]
    assert loop.known({}) is None
    manager.batch_processor = None
    with pytest.raises(CarpoolError, match="continuous batching of this transformers"):
        loop.known({"cu_seq_lens_q": ends})
