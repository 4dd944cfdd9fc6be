"""One running engine that can be switched between stock, Carpool and forced routings, between two steps.

`Stock`: every hook of the plugin is taken out, so the engine runs the code it would run without it. `Forced`: stock,
but each router hands out ids that were made before: what any policy with these ids could reach at best.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from carpool.experts.surrogates import NAMES, SCALES
from carpool.hosts.engine import compiled
from carpool.hosts.vllm.supplement import hook
from carpool.routing.spec import Routing

Ids = list[list[Tensor]]  # of some steps, of each layer: int32 [N, K]


class Hooks:
    """What the plugin has put into a running engine of this process, to be taken out and put in again.

    Args:
        llm: the engine, with the plugin configured.
    """

    def __init__(self, llm: Any) -> None:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        self.host, self.runner = worker.carpool, worker.model_runner
        self.routers = [layer.router for layer in self.host.layers]
        self._shared = [type(router) for router in self.routers]
        self._followers = {name: vars(self.runner)[name] for name in ("_model_forward", "execute_model")}

    def take_out(self) -> None:
        """Between two steps."""
        for name in self._followers:
            vars(self.runner).pop(name, None)
        for router, shared in zip(self.routers, self._shared, strict=True):
            router.__class__ = shared.__mro__[1]
        for layer in self.host.layers:
            experts = layer.runner.routed_experts
            if hasattr(type(experts), "carpool_kind"):
                experts.__class__ = type(experts).__mro__[1]

    def put_in(self) -> None:
        """Between two steps."""
        vars(self.runner).update(self._followers)
        for router, shared in zip(self.routers, self._shared, strict=True):
            router.__class__ = shared
        for layer in self.host.layers:
            if NAMES[0] in layer.statistics:
                hook(layer)


class Engine:
    """An `LLM` in this process, with the plugin configured, and a batch of requests that decode forever.

    Args:
        llm: the engine. batch: number of requests. seed: of their prompts. compile: policies.
    """

    def __init__(self, llm: Any, batch: int, seed: int = 0, prompt: int = 16, compile: bool = True) -> None:
        from vllm import SamplingParams

        self.engine, self.llm, self.batch, self.compile = llm.llm_engine, llm, batch, compile
        self.hooks = Hooks(llm)
        self.host, self.runner, self.routers = self.hooks.host, self.hooks.runner, self.hooks.routers
        self.requests = [f"batch-{batch}-{i}" for i in range(batch)]
        limit = llm.llm_engine.vllm_config.model_config.max_model_len
        generator = torch.Generator().manual_seed(seed)
        for i, name in enumerate(self.requests):
            given = SamplingParams(max_tokens=limit - prompt, ignore_eos=True, detokenize=False, seed=None)
            ids = torch.randint(0, 8000, (prompt,), generator=generator).tolist()
            self.engine.add_request(name, {"prompt_token_ids": [(t + i) % 8000 for t in ids]}, given)
        while self.runner.input_batch.num_reqs < batch or self._prefilling():
            self.engine.step()

    def _prefilling(self) -> bool:
        rows = self.runner.input_batch
        return bool((rows.num_computed_tokens_cpu[: self.batch] < rows.num_prompt_tokens[: self.batch]).any())

    def step(self) -> None:
        """One decode step of all requests."""
        outputs = self.engine.step()
        if len(outputs) != self.batch:
            raise RuntimeError(f"{len(outputs)} of {self.batch} requests decoded; give the model more length")

    def give_statistics(self, rank: int) -> int:
        """Statistics of random numbers: the right size, and nothing that they know.

        Args:
            rank: of surrogates; 0 for none.

        Returns:
            Bytes of one expert's surrogate.
        """
        for layer in self.host.layers:
            layer.statistics = random_statistics(layer.num_experts, layer.hidden_size, layer.position)
            if rank:
                layer.statistics |= random_surrogates(layer.num_experts, rank, layer.hidden_size, layer.position)
        self.hooks.put_in()
        return (2 * rank + 1) * (self.host.layers[0].hidden_size + 4) if rank else 0

    def close(self) -> None:
        self.stock()
        self.engine.abort_request(self.requests)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.hooks.put_in()

    def stock(self) -> None:
        """Take all hooks out."""
        self.hooks.take_out()

    def forced(self, ids: Ids) -> None:
        """Stock, but with these ids in turn."""
        self.stock()
        for position, router in enumerate(self.routers):
            router.__class__ = _forced_class(type(router))
            router.forced_ids, router.forced_at = [step[position] for step in ids], 0

    def policy(self, text: str | None) -> None:
        """Share by a policy, or be switched off."""
        self.hooks.put_in()
        if text is None:
            self.llm.collective_rpc("carpool_set", kwargs={"enabled": False})
        else:
            self.llm.collective_rpc("carpool_set", kwargs={"policy": text, "enabled": True, "compile": self.compile})

    def report(self) -> dict[str, float]:
        """Sums of the counters over layers since the last call."""
        [report] = self.llm.collective_rpc("carpool_report", kwargs={"reset": True})
        names = ("steps", "rows", "rows_changed", "natural_union", "union", "surrogates")
        return {name: float(sum(layer[name] for layer in report["layers"])) for name in names}

    def record(self, steps: int) -> Ids:
        """The ids that the experts get in the next steps."""
        recorded: Ids = []
        with self.recording(recorded):
            for _ in range(steps):
                self.step()
        return recorded

    @contextlib.contextmanager
    def recording(self, recorded: Ids) -> Iterator[None]:
        """Meanwhile the ids that the experts get are added to a list, step by step."""

        def record(ids_NK: Tensor) -> None:
            if not recorded or len(recorded[-1]) == len(self.routers):
                recorded.append([])
            recorded[-1].append(ids_NK.clone())

        for router in self.routers:
            router.set_capture_fn(record)
        try:
            yield
        finally:
            for router in self.routers:
                router.set_capture_fn(None)

    def compare_graph(self) -> list[bool]:
        """One step operation by operation; whether each layer's compiled graph takes the same experts, and its
        compiled surrogates give the same."""
        same: list[bool] = []

        def observe(layer: Any, logits_NE: Tensor, outcome: Any) -> None:
            native = Routing(outcome.inputs.native_ids_NK.int(), outcome.routing.weights_NK)
            hidden = logits_NE if outcome.inputs.hidden_NH is None else outcome.inputs.hidden_NH
            done = layer.graph and compiled.run(layer.graph, layer, hidden, logits_NE, native, layer.step.rows)
            same.append(bool(done) and torch.equal(done[0].ids_NK, outcome.routing.ids_NK))
            if same[-1] and done[0].surrogate_ids_NK is not None:
                same[-1] = same_sum(layer, done[0])

        self.host.step.observer = observe
        try:
            self.step()
        finally:
            self.host.step.observer = None
        return same


def random_statistics(experts: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """What the policies need of a layer that need statistics."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "similarity_frobenius": torch.rand(experts, experts, generator=generator),
        "easy_ep": torch.rand(experts, generator=generator),
        "sensitivity": torch.tensor(1.0),
        "norm_weight": torch.randn(experts, hidden, generator=generator) / hidden**0.5,
        "norm_bias": torch.zeros(experts),
        "norm_scale": torch.tensor(1.0),
    }


def random_surrogates(experts: int, rank: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """A layer's statistics, with maps so small that they change nothing but the time."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, scale, rows in zip(NAMES, SCALES, (rank, rank + 1), strict=True):
        made[name] = torch.randint(-127, 128, (experts, rows, hidden), generator=generator, dtype=torch.int8)
        made[scale] = torch.full((experts, rows), 1e-5)
    return made | {"surrogate_energy": torch.ones(experts), "surrogate_unexplained": torch.full((experts,), 0.5)}


def same_sum(layer: Any, routing: Routing) -> bool:
    """Whether compiled surrogates give what they give operation by operation."""
    if layer.resident.sum is None:
        return False
    hidden_NH = torch.randn(len(routing.ids_NK), layer.hidden_size, generator=torch.Generator().manual_seed(0))
    left = routing.surrogate_ids_NK, routing.surrogate_weights_NK
    found_NH, wanted_NH = layer.resident(hidden_NH, *left), layer.resident.whole()(hidden_NH, *left)
    return torch.allclose(found_NH, wanted_NH, rtol=1e-3, atol=1e-4 * float(wanted_NH.abs().max()))


_classes: dict[type, type] = {}


def _forced_class(kind: Any) -> Any:
    if kind not in _classes:

        class Forced(kind):
            def _compute_routing(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                weights_NK, _ = super()._compute_routing(*args, **kwargs)
                self.forced_at += 1
                return weights_NK, self.forced_ids[self.forced_at % len(self.forced_ids)]

        _classes[kind] = Forced
    return _classes[kind]


def union(ids: Ids) -> float:
    """Mean number of distinct experts of a layer and step."""
    counts = [len(layer.unique()) for step in ids for layer in step]
    return sum(counts) / len(counts)


def random_ids(rows: int, top_k: int, experts: int, like: Ids, seed: int) -> Ids:
    """Random sets of as many experts as other ids have, layer by layer; each row draws from its layer's set, and all
    are used."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [[max(top_k, len(layer.unique())) for layer in step] for step in like]  # some policies skip experts
    return [
        [_draw(rows, top_k, torch.randperm(experts, generator=generator)[:size], generator) for size in step]
        for step in sizes
    ]


def _draw(rows: int, top_k: int, members: Tensor, generator: torch.Generator) -> Tensor:
    places_NK = torch.rand(rows, len(members), generator=generator).topk(top_k, dim=-1).indices
    counts = torch.bincount(places_NK.flatten(), minlength=len(members))
    for missing in (counts == 0).nonzero().flatten().tolist():
        spare = (counts[places_NK] > 1) & ~(places_NK == missing).any(-1, keepdim=True)
        row, slot = spare.nonzero()[int(torch.randint(int(spare.sum()), (1,), generator=generator))].tolist()
        counts[places_NK[row, slot]] -= 1
        counts[missing] += 1
        places_NK[row, slot] = missing
    return members[places_NK].int().contiguous()
