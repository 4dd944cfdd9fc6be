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
from transformers import ContinuousBatchingConfig, GenerationConfig

import carpool
from carpool import Batch, CarpoolError, Grouping
from carpool.hosts.transformers import attach
from carpool.hosts.transformers.batching import Packed
from carpool.hosts.transformers.forward_rows import RowRules, build_batch
from carpool.hosts.transformers.here import Here
from carpool.hosts.transformers.known import Generation


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


@pytest.mark.parametrize(
    ("early", "improves", "ended", "through"),
    [
        (True, [1, 1], [[1, 1], [0, 1]], [1, 0]),  # as many ended as are asked for
        (False, [1, 1], [[1, 1], [0, 1]], [0, 0]),
        (False, [0, 1], [[1, 1], [1, 1]], [1, 0]),  # no running beam could become better than those that ended
    ],
)
def test_beams_of_a_prompt_that_is_through(
    early: bool, improves: list[int], ended: list[list[int]], through: list[int]
) -> None:
    model: Any = tiny_model("qwen3_moe")
    loop = Generation(custom=False, drafts=False)
    loops = attach(model).here.loops
    loops.append(loop)
    model._beam_search_has_unfinished_sequences(
        torch.tensor(improves).bool().unsqueeze(1), torch.tensor(ended).bool(), torch.zeros(2, 4).bool(), early
    )
    assert loop.finished_B is not None
    assert loop.finished_B.tolist() == [bool(prompt) for prompt in through for _ in range(2)]


def test_a_manager_that_is_kept_belongs_to_the_block_that_uses_it() -> None:
    """Continuous batching may keep its manager from call to call, in blocks and between them."""
    model: Any = tiny_model("qwen3_moe")
    model.set_attn_implementation("sdpa")

    def generate() -> list[int]:
        made = model.generate_batch(
            ids(3, 5).tolist(),
            generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=32),
            persistent_manager=True,
        )
        return [token for one in made.values() for token in one.generated_tokens]

    stock = generate()
    with carpool.share(model, "topk(k=1)") as run:
        shared = generate()
    assert run.changed_rows() > 0
    assert shared != stock
    assert generate() == stock
    with carpool.share(model, "topk(k=1)") as again:
        assert generate() == shared
    assert again.changed_rows() == run.changed_rows()
    model.destroy_cached_continuous_batching_manager()
