"""The reference model, its texts and its router logits, for the benchmarks of isolation."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carpool import Batch, Outcome, parse, route
from carpool.artefacts.texts import load_texts
from carpool.cli.common import embedded_texts, load, model_facts
from carpool.evaluate.layout import Layout
from carpool.evaluate.results import provenance, text_facts
from carpool.evaluate.sequences import Sequences, draw
from carpool.evaluate.study import describe
from carpool.hosts.transformers import find_layers
from carpool.hosts.transformers.plans import prepare
from carpool.plans.grammar import Plan
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Grouping


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows as the routers of each layer saw them under native routing.

    Attributes:
        logits_LNE: router logits. hidden_LNH: the routers' inputs.
    """

    logits_LNE: Tensor
    hidden_LNH: Tensor

    @property
    def rows(self) -> int:
        return self.logits_LNE.shape[1]


class Reference:
    """The reference model with its texts and statistics."""

    def __init__(self) -> None:
        self.paths = embedded_texts()
        self.model, self.tokenizer, self.stats = load(None, None)
        self.moe = describe(self.model)
        self.layers = find_layers(self.model)

    def facts(self, **arguments: Any) -> dict[str, Any]:
        """What goes to the head of a result."""
        model = model_facts(self.model, None)
        return {**provenance(), "model": model, "texts": text_facts(self.paths), "arguments": arguments}

    def head(self, given: Namespace) -> dict[str, Any]:
        """What `write_rows` wants of it: a command's arguments but for its output, the model and the texts."""
        arguments = {name: value for name, value in vars(given).items() if name != "output"}
        facts = self.facts(**arguments)
        return {name: facts[name] for name in ("model", "texts", "arguments")}

    def sequences(self, count: int, length: int, seed: int, domain: str | None = None) -> Sequences:
        """Windows of the held-out texts, of one domain or of all of them."""
        documents = [one for one in load_texts(self.paths) if domain in (None, one.domain)]
        return draw(documents, self.tokenizer, count=count, length=length, seed=seed)

    def record(self, ids_ST: Tensor, last: int | None = None, cache: Any = None) -> Pool:
        """Router logits and inputs over sequences, of all positions or of the last few; `cache` holds what came
        before them."""
        logits: list[Tensor] = []
        hidden: list[Tensor] = []

        def see(layer: Any, args: Any, output: Any) -> None:
            logits.append(layer.routed(output)[0].float())
            hidden.append(args[0].reshape(-1, args[0].shape[-1]).float())

        hooks = [
            layer.router.register_forward_hook(lambda _, args, output, layer=layer: see(layer, args, output))
            for layer in self.layers
        ]
        try:
            with torch.inference_mode():
                self.model.base_model(input_ids=ids_ST, past_key_values=cache, use_cache=cache is not None)
        finally:
            for hook in hooks:
                hook.remove()
        keep = slice(0 if last is None else -last, None)
        count, length = ids_ST.shape
        kept = [[x.view(count, length, -1)[:, keep].flatten(0, 1) for x in values] for values in (logits, hidden)]
        return Pool(torch.stack(kept[0]), torch.stack(kept[1]))

    def prepared(self, text: str) -> list[tuple[Plan, Any]]:
        """Plan and statistics of every layer."""
        return [(one[0], one[1]) for one in prepare(PolicyFile(parse(text)), self.layers, self.stats)]

    def route(self, prepared: list[tuple[Plan, Any]], pool: Pool, layer: int, rows_N: Tensor, batch: Batch) -> Outcome:
        """Route rows of the pool in one layer."""
        plan, stats = prepared[layer]
        logits_NE, hidden_NH = pool.logits_LNE[layer, rows_N], pool.hidden_LNH[layer, rows_N]
        return route(plan, self.layers[layer].spec, logits_NE, batch, stats=stats, hidden_NH=hidden_NH)


class Prompts:
    """Texts of `P` tokens whose next token is open: keys and values under native routing, computed once, so that a
    decoding step costs one token a row."""

    def __init__(self, reference: Reference, ids_SP: Tensor) -> None:
        self._reference = reference
        with torch.inference_mode():
            cache = reference.model.base_model(input_ids=ids_SP, use_cache=True).past_key_values
        self._kept = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, prompt_N: Tensor) -> Any:
        """What attention finds behind rows that follow these prompts."""
        from transformers import DynamicCache

        made = DynamicCache()
        for layer, (keys, values) in enumerate(self._kept):
            made.update(keys[prompt_N], values[prompt_N], layer)
        return made

    def decode(self, rows_N2: Tensor) -> Tensor:
        """The last hidden state `[N, H]` of rows given as (prompt, token)."""
        how = {"past_key_values": self.cache(rows_N2[:, 0]), "use_cache": True}
        return self._reference.model.base_model(input_ids=rows_N2[:, 1:], **how).last_hidden_state[:, -1]

    def record(self, rows_N2: Tensor) -> Pool:
        """Router logits and inputs of such rows under native routing."""
        return self._reference.record(rows_N2[:, 1:], cache=self.cache(rows_N2[:, 0]))


def groups_of(count: int, size: int) -> Batch:
    """`count` groups of `size` rows each, every one a step of its own."""
    group_N = torch.arange(count).repeat_interleave(size)
    return Batch.of(count * size, group_N=group_N, num_groups=count, step_N=group_N, num_steps=count)


def last_step(rows: int, positions: int) -> Layout:
    """Sequences whose last token is decoded in one step."""
    return Layout(rows, positions, positions - 1, Grouping.parse("batch"))
