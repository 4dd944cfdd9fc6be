"""A forward belongs to one run or to none, whichever thread, task, generator or copy of the model it comes from."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor

import carpool
from carpool import CarpoolError
from carpool.hosts.transformers import Known, attach

PLANS = ("xshare(budget=2, warmup=0)", "topk(k=1)", "oea(k0=1)", "lynx(budget=3)")
TIGHT = PLANS[0]
THREADS, FORWARDS = 8, 1000


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@torch.no_grad()
def logits(model: Any, seed: int = 1) -> Tensor:
    return model(input_ids=tokens(seed=seed)).logits


@torch.no_grad()
def hidden(inner: Any) -> Tensor:
    return inner(tokens()).last_hidden_state


def share(model: Any, plan: str = TIGHT, **options: Any) -> Any:
    return carpool.share(model, plan, exempt_prefill=False, **options)


def shared(model: Any, plan: str = TIGHT, seed: int = 1) -> Tensor:
    with share(model, plan):
        return logits(model, seed)


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_stock_beside_runs_in_eight_threads(model: Any) -> None:
    """Half of the threads are stock, the others each share under a plan of their own, block after block; every forward
    gives bit for bit what it gives alone, and every run counts its own forwards."""
    seeds, per_block = range(5), 5
    stock = [logits(model, seed) for seed in seeds]
    alone = {plan: [shared(model, plan, seed) for seed in seeds] for plan in PLANS}
    assert not any(torch.equal(one, stock[0]) for one, *_ in alone.values())
    together, each = threading.Barrier(THREADS), FORWARDS // THREADS

    def work(which: int) -> list[bool]:
        together.wait()
        if which % 2 == 0:
            return [torch.equal(logits(model, n % 5), stock[n % 5]) for n in range(each)]
        plan, same = PLANS[which // 2], []
        for _ in range(each // per_block):
            with share(model, plan) as run:
                same += [torch.equal(logits(model, n), alone[plan][n]) for n in seeds]
            assert [row.calls for row in run.report()] == [per_block] * 2
        return same

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS)))
    assert sum(map(len, results)) == FORWARDS
    assert all(map(all, results))


def test_threads_of_one_run_count_together(model: Any) -> None:
    alone, forwards = shared(model), 20
    with share(model) as run, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run.here(lambda _: logits(model)), range(forwards)))
        other = pool.submit(logits, model).result()
    assert all(torch.equal(alone, one) for one in results)
    assert [row.calls for row in run.report()] == [forwards] * 2
    assert torch.equal(other, logits(model))


def test_rows_are_said_for_a_thread(model: Any) -> None:
    """What one thread of a run says of its rows is not said of another's."""
    with share(model) as run:
        run.batch = carpool.Batch.of(5)
        assert in_thread(run.here(lambda: run.batch)) is None
        in_thread(run.here(lambda: logits(model)))


@pytest.mark.parametrize("bound", [False, True])
def test_streaming_from_a_thread(model: Any, bound: bool) -> None:
    """`generate` in a thread, the way of transformers' iterating streamers: bound to the block it shares; otherwise it
    is stock, and a block in which nothing shared says so."""
    from transformers.generation.streamers import BaseStreamer

    class Tokens(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            pass

    settings = {"inputs": tokens(1, 5), "max_new_tokens": 6, "do_sample": False, "eos_token_id": 63}
    stock, streamer = model.generate(**settings)[0].tolist(), Tokens()
    with carpool.share(model, "topk(k=1)"):
        alone = model.generate(**settings)[0].tolist()
    assert alone != stock

    def stream() -> None:
        with carpool.share(model, "topk(k=1)") as run:
            target = run.here(model.generate) if bound else model.generate
            thread = threading.Thread(target=target, kwargs={**settings, "streamer": streamer})
            thread.start()
            thread.join()

    if bound:
        stream()
    else:
        with pytest.raises(CarpoolError, match=r"never fired.*another thread.*run\.here"):
            stream()
    assert streamer.seen == (alone if bound else stock)


def test_a_thread_that_outlives_its_block_is_stopped(model: Any) -> None:
    """Half of a generation under a policy and half without would be neither; so is a function called too late."""
    going, left = threading.Event(), threading.Event()

    def stream() -> None:
        logits(model)
        going.set()
        left.wait()
        logits(model)

    with ThreadPoolExecutor(1) as pool:
        with share(model) as run:
            future = pool.submit(run.here(stream))
            going.wait()
        assert torch.equal(logits(model), in_thread(lambda: logits(model)))
        left.set()
        with pytest.raises(CarpoolError, match="was left while something bound to it"):
            future.result()
    with pytest.raises(CarpoolError, match="was left"):
        run.here(logits)(model)
    assert not attach(model).open
    assert not attach(model).wanderers


def stream(model: Any, plan: str = TIGHT, times: int = 3) -> Iterator[Tensor]:
    with share(model, plan):
        for _ in range(times):
            yield logits(model)


def test_others_are_stock_while_a_stream_is_suspended(model: Any) -> None:
    stock, alone = logits(model), shared(model)
    one = stream(model)
    assert torch.equal(next(one), alone)
    assert torch.equal(logits(model), stock)
    with share(model, "topk(k=1)") as run:
        first = logits(model)
        assert torch.equal(next(one), alone), "the stream goes on in its own block"
        assert torch.equal(logits(model), first)
    assert [row.calls for row in run.report()] == [2, 2]
    assert torch.equal(first, shared(model, "topk(k=1)"))
    assert torch.equal(next(one), alone)
    assert torch.equal(logits(model), stock)
    assert next(one, None) is None


def test_an_abandoned_stream_blocks_nobody(model: Any) -> None:
    stock, alone = logits(model), shared(model)
    kept, dropped = stream(model), stream(model, "topk(k=1)")
    next(kept)
    next(dropped)
    del dropped
    assert len(attach(model).open) == 1
    assert torch.equal(logits(model), stock)
    assert torch.equal(shared(model), alone)
    kept.close()
    assert not attach(model).open
    assert torch.equal(logits(model), stock)


def test_a_stream_may_go_on_in_other_threads(model: Any) -> None:
    """Servers iterate over a generator in whichever thread is free."""
    alone, one = shared(model), stream(model, times=3)
    for _ in range(3):
        assert torch.equal(in_thread(lambda: next(one)), alone)
        assert not torch.equal(logits(model), alone)
    assert in_thread(lambda: next(one, None)) is None


def test_a_generator_function_can_be_bound(model: Any) -> None:
    def twice() -> Iterator[Tensor]:
        yield logits(model)
        yield logits(model)

    alone = shared(model)
    with share(model) as run:
        bound = run.here(twice)()
        first = in_thread(lambda: next(bound))
        second = in_thread(lambda: next(bound))
        assert not torch.equal(in_thread(lambda: logits(model)), alone)
        assert list(bound) == []
    assert torch.equal(first, alone)
    assert torch.equal(second, alone)

    async def endless() -> Any:
        yield 1

    with pytest.raises(CarpoolError, match="endless is an asynchronous generator"):
        run.here(endless)
    with share(model) as run:
        logits(model)
        with pytest.raises(CarpoolError, match="returned a generator, which has yet to run"):
            run.here(lambda: twice())()


def test_tasks(model: Any) -> None:
    """A block in a coroutine is its own while it waits: tasks beside it and tasks that it makes are stock, but for
    those that are bound to it; blocks of several tasks overlap."""
    stock, alone = logits(model), {plan: shared(model, plan) for plan in PLANS}

    async def plain() -> Tensor:
        await asyncio.sleep(0)
        return logits(model)

    async def sharing(plan: str) -> list[bool]:
        same = []
        with share(model, plan) as run:
            for _ in range(5):
                same.append(torch.equal(logits(model), alone[plan]))
                same.append(torch.equal(await plain(), alone[plan]))
                await asyncio.sleep(0)
            mine, bound = await asyncio.gather(plain(), run.here(plain)())
            same += [torch.equal(mine, stock), torch.equal(bound, alone[plan])]
            same.append(torch.equal(await asyncio.to_thread(run.here(logits), model), alone[plan]))
        return same

    async def beside() -> list[bool]:
        return [torch.equal(await plain(), stock) for _ in range(20)]

    async def everybody() -> Any:
        return await asyncio.gather(beside(), *map(sharing, PLANS), beside())

    assert all(map(all, asyncio.run(everybody())))
    assert not attach(model).open


def test_blocks_entered_by_context_managers(model: Any) -> None:
    """A `with` of one's own around `share`, a stack, a decorator, a block entered by hand: inside is what is called
    while they are open, by the code that opened them."""
    stock, alone = logits(model), shared(model)

    @contextmanager
    @torch.no_grad()
    def policy() -> Iterator[Any]:
        with share(model) as run:
            yield run

    @asynccontextmanager
    async def later() -> Any:
        with policy() as run:
            yield run

    @share(model)
    def decorated() -> Tensor:
        return logits(model)

    async def task() -> Tensor:
        async with later():
            await asyncio.sleep(0)
            return logits(model)

    with policy():
        assert torch.equal(logits(model), alone)
        assert torch.equal(in_thread(lambda: logits(model)), stock)
    assert torch.equal(asyncio.run(task()), alone)
    assert torch.equal(decorated(), alone)
    with ExitStack() as stack:
        stack.enter_context(policy())
        assert torch.equal(logits(model), alone)

    def by_hand() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(share(model))
        return stack

    stack = by_hand()
    assert torch.equal(logits(model), alone)
    assert torch.equal(in_thread(lambda: logits(model)), stock)
    with pytest.raises(CarpoolError, match="already shares"):
        by_hand()
    in_thread(stack.close)
    assert torch.equal(logits(model), stock)

    def suspended() -> Iterator[Tensor]:
        with by_hand():
            yield logits(model)

    one = suspended()
    assert torch.equal(next(one), alone)
    assert torch.equal(logits(model), stock)
    one.close()


def test_nested_blocks_are_refused_and_the_outer_one_survives(model: Any) -> None:
    for outer, inner in ((model, model), (model, model.model), (model.model, model), (model.model, model.model)):
        with share(outer) as run:
            with pytest.raises(CarpoolError, match="already shares under xshare"), share(inner, "topk(k=1)"):
                pass
            with pytest.raises(CarpoolError, match="already shares"), run.here(shared)(inner):
                pass
            logits(model)
        assert [row.calls for row in run.report()] == [1, 1]
        assert run.changed_rows() > 0


def test_a_bound_function_inside_another_block_is_refused(model: Any) -> None:
    one = stream(model)
    next(one)
    with share(model) as run:
        logits(model)

        def inner() -> Iterator[Any]:
            with share(model, "topk(k=1)"):
                logits(model)
                yield run.here(logits)

        other = inner()
        with pytest.raises(CarpoolError, match="already shares"):
            next(other)


def test_a_part_or_a_whole_have_the_same_hooks(model: Any) -> None:
    inner = attach(model.model)
    assert attach(model) is inner
    assert attach(model.model) is inner
    assert len(model.model.layers[0].mlp.gate._forward_hooks) == 1
    with share(model.model) as run:
        logits(model)
    assert [row.layer for row in run.report()] == ["layers.0.mlp", "layers.1.mlp"]
    assert run.changed_rows() > 0


def test_layers_of_another_model_that_shares(model: Any) -> None:
    twin = tiny_model("qwen3_moe", seed=1)
    twin.model.layers[0] = model.model.layers[0]
    with share(model):
        with pytest.raises(CarpoolError, match="layers of a model that already shares"), share(twin):
            pass
        logits(model)
    assert shared(twin).isfinite().all()


def test_copies_are_models_of_their_own(model: Any) -> None:
    """Made inside of a block or outside, of the whole model or a part, by copying or pickling."""
    stock, alone = logits(model), shared(model)
    ways: list[Callable[[Any], Any]] = [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))]
    streams = [stream(model)]
    next(streams[0])  # suspended in a block of its own while the copies are made
    with share(model) as run:
        logits(model)
        twins = [way(model) for way in ways]
        parts = [way(model.model) for way in ways]
        for twin in twins:
            assert torch.equal(logits(twin), stock)
            assert attach(twin) is not attach(model)
            with share(twin, "topk(k=1)") as other:
                logits(twin)
                assert torch.equal(logits(model), alone)
            assert [row.calls for row in other.report()] == [1, 1]
        for part in parts:
            assert not torch.equal(hidden(part), hidden(model.model))
            assert torch.equal(hidden(part), hidden(twins[0].model))
    assert [row.calls for row in run.report()] == [1 + 2 + 2] * 2
    for twin in twins:
        assert torch.equal(shared(twin), alone)
        assert torch.equal(logits(twin), stock)
        assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_nothing_behind(model: Any, error: type[BaseException]) -> None:
    """Neither for the forwards of the block, also of the inner model, nor for those after it."""
    stock, alone, layer = logits(model), shared(model), model.model.layers[1]
    inner = hidden(model.model)

    def interrupt(*_: Any) -> None:
        raise error

    def interrupted() -> None:
        handle = layer.register_forward_pre_hook(interrupt)
        try:
            logits(model)
        finally:
            handle.remove()

    with share(model) as run:
        with pytest.raises(error):
            interrupted()
        run.known = Known(finished=torch.ones(4).bool())  # what the interrupted forward did not know
        assert torch.equal(hidden(model.model), inner)
        run.known = None
        assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model), stock)
    assert run.changed_rows() > 0
    with pytest.raises(error), share(model):
        interrupted()
    with pytest.raises(CarpoolError, match="outside the model's forward"), share(model):
        layer.mlp(torch.zeros(1, 2, 32))
    assert not attach(model).here.calls


def test_a_model_called_from_within_its_forward(model: Any) -> None:
    """An observer that asks the model about other tokens gets a forward of its own, and the first one goes on."""
    alone, seen = shared(model), []

    def observe(place: int, batch: Any, outcome: Any) -> None:
        if len(seen) == 0:
            seen.append(None)
            seen[0] = logits(model, seed=2)

    with share(model, observe=observe):
        outer = logits(model)
    assert torch.equal(outer, alone)
    assert torch.equal(seen[0], shared(model, seed=2))


def test_compiled_models_keep_threads_and_streams_apart() -> None:
    """One compiled model: a run in this thread, stock in another, and a stream that is suspended meanwhile."""
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    stock, alone = logits(model), shared(model)
    attach(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), stock)
    with share(model) as run:
        for _ in range(2):
            torch.testing.assert_close(logits(compiled), alone)
            torch.testing.assert_close(in_thread(lambda: logits(compiled)), stock)
            torch.testing.assert_close(in_thread(run.here(lambda: logits(compiled))), alone)
    assert [row.calls for row in run.report()] == [4]
    breaking = torch.compile(model, backend="eager")
    one = stream(breaking)
    torch.testing.assert_close(next(one), alone)
    torch.testing.assert_close(logits(breaking), stock)
    torch.testing.assert_close(next(one), alone)
    one.close()
