"""Continuous batching runs its forwards in a thread of its own: one that is made in a block belongs to the block. Its
manager knows which rows are of prompts, in chunks or of one token, and which requests are samples of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.here import Here, Shares
from carpool.hosts.transformers.known import Known

INIT, LOOP = "init_continuous_batching", "_run_generation_loop"
CHILD = "__child#"  # what transformers puts between a request's name and the number of a sample of it


class Packed:
    """The loop of one manager."""

    drafts = False

    def __init__(self, manager: Any, here: Here) -> None:
        self.manager, self.here = manager, here
        self.run = getattr(manager, LOOP)

    def __call__(self) -> Any:
        self.here.loops.append(self)
        try:
            return self.run()
        finally:
            self.here.loops.pop()

    def known(self, kwargs: Mapping[str, Any]) -> Known | None:
        """Of the requests in the batch. None for a batch of nobody's (a warm-up), and while a graph is recorded that
        serves other requests later: there the lengths of the requests' rows tell."""
        ends = kwargs.get("cu_seq_lens_q")
        requests = _requests(self.manager)
        if ends is None or not requests or (ends.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        padding = len(ends) - 1 - len(requests)
        prompts = [len(one.state.initial_tokens) for one in requests] + [0] * padding
        parents = [one.state.request_id.partition(CHILD)[0] for one in requests]
        numbers = {parent: number for number, parent in enumerate(dict.fromkeys(parents))}
        prompt = [numbers[parent] for parent in parents] + [-1] * padding
        return Known(
            finished=False,
            prefill=torch.tensor(prompts, device=ends.device),
            prompt=torch.tensor(prompt, device=ends.device),
        )


def _requests(manager: Any) -> list[Any]:
    try:
        held = manager.batch_processor.inputs_and_outputs
        pairs = getattr(held, "io_pairs", None)
        found: list[Any] = (held if pairs is None else pairs[held.current_pair].host_io).requests_in_batch
    except AttributeError as error:
        raise CarpoolError(
            f"the continuous batching of this transformers is not the one that Carpool knows ({error}); use generate"
        ) from None
    return found


class _Init:
    # an object, not a closure: a deep copy of the model must watch itself
    def __init__(self, model: nn.Module, here: Here, owner: Callable[[], Shares | None]) -> None:
        self.model, self.here, self.owner = model, here, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(type(self.model), INIT)(self.model, *args, **kwargs)
        manager.__dict__.pop(LOOP, None)  # a manager that was kept may be bound to an earlier block
        run = self.owner()
        if run is not None:
            manager.__dict__[LOOP] = run.here(Packed(manager, self.here))
        return manager


def watch(model: nn.Module, here: Here, owner: Callable[[], Shares | None]) -> None:
    """Watch who makes the model's managers of continuous batching."""
    if hasattr(type(model), INIT):
        model.__dict__[INIT] = _Init(model, here, owner)
