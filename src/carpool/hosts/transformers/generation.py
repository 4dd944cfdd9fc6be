"""What the loops of `generate` know of their rows: which are a prompt's, which have ended, which are samples of one.

The model's forward is not told. The loops go through a few methods of the model that are watched here, on the model
itself, not its class.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.here import Here
from carpool.hosts.transformers.known import Generation


class _Watched:
    # objects, not closures: a deep copy of the model must watch itself
    name: str
    needed: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, here: Here, inner: Any) -> None:
        self.model, self.here, self.inner = model, here, inner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Any:
        """The class's own method, or what somebody else had put in its place."""
        return getattr(type(self.model), self.name).__get__(self.model) if self.inner is None else self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loop = self.here.loops[-1] if self.here.loops else None
        if not isinstance(loop, Generation):
            return self.original(*args, **kwargs)
        return self.watched(loop, args, kwargs)

    def watched(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Generate(_Watched):
    name = "generate"
    needed = ("custom_generate",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loops = self.here.loops
        loops.append(Generation(kwargs.get("custom_generate") is not None, drafts=bool(loops)))
        try:
            return self.original(*args, **kwargs)
        finally:
            loops.pop()


class _Expand(_Watched):
    """Once, before the loop: the prompts are repeated for their samples."""

    name = "_expand_inputs_for_generation"
    needed = ("expand_size", "input_ids")

    def watched(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids, more = self.original(*args, **kwargs)
        generation.samples = kwargs["expand_size"]
        given = [one for one in (ids, more.get("inputs_embeds")) if isinstance(one, Tensor)]
        generation.rows = max(one.shape[0] for one in given)
        generation.tokens = max(one.shape[1] for one in given)
        return ids, more


class _Criteria(_Watched):
    """Once, before the loop: what is asked after each step which rows have ended."""

    name = "_get_stopping_criteria"
    needed = ("generation_config",)

    def watched(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generation.beams = kwargs["generation_config"].num_beams > 1
        return stops(self.original(*args, **kwargs), generation)


class _Prefill(_Watched):
    """The loops of samples and beams read the prompt in here, in chunks or whole."""

    name = "_prefill"
    needed = ("input_ids", "generation_config", "model_kwargs")

    def watched(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        cache, config = given["model_kwargs"].get("past_key_values"), given["generation_config"]
        generation.cached = bool(given["model_kwargs"].get("use_cache", True))
        generation.reading = not (config.is_assistant and cache is not None and bool(cache.get_seq_length()))
        try:
            return self.original(*args, **kwargs)
        finally:
            generation.reading = None


class _Candidates(_Watched):
    """Once, before a loop that verifies candidates."""

    name = "_get_candidate_generator"

    def watched(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generation.verifies = True
        return self.original(*args, **kwargs)


class _Beams(_Watched):
    """After each step of a beam search. No beam of a prompt whose results are settled can change them any more."""

    name = "_beam_search_has_unfinished_sequences"
    needed = ("is_early_stop_heuristic_unsatisfied", "is_sent_finished", "early_stopping")

    @property
    def original(self) -> Any:
        return getattr(type(self.model), self.name) if self.inner is None else self.inner  # a static method

    def watched(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        improves_P1, ended_PB = given["is_early_stop_heuristic_unsatisfied"], given["is_sent_finished"]
        settled_P = ~improves_P1.any(-1)
        if given["early_stopping"] is True:
            settled_P = settled_P | ended_PB.all(-1)
        generation.finished_B = settled_P.repeat_interleave(ended_PB.shape[1])
        return self.original(*args, **kwargs)


WATCHED: tuple[type[_Watched], ...] = (_Generate, _Expand, _Criteria, _Prefill, _Candidates, _Beams)


def stops(criteria: Any, generation: Generation) -> Any:
    """The criteria as a list of the same kind, which tells the generation what they said."""
    from transformers import StoppingCriteriaList

    class Told(StoppingCriteriaList):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            done_B: Tensor = super().__call__(input_ids, scores, **kwargs)
            generation.stopped(done_B)
            return done_B

    return Told(criteria)


def watch(model: nn.Module, here: Here) -> None:
    """Watch the model's generations, if it generates text with transformers' loops.

    Raises:
        CarpoolError: it does, but the loops are others than this was written for.
    """
    from transformers import GenerationMixin

    kind = type(model)
    if not isinstance(model, GenerationMixin) or not hasattr(kind, "generate"):
        return
    for watched in WATCHED:
        parameters = inspect.signature(getattr(kind, watched.name, lambda: None)).parameters
        missing = [name for name in watched.needed if name not in parameters]
        if missing or not hasattr(kind, watched.name):
            lacks = f"parameter {missing[0]!r}" if hasattr(kind, watched.name) else "such method"
            raise CarpoolError(
                f"{kind.__name__}.{watched.name}: this transformers has no {lacks}, by which Carpool knows whose rows "
                "`generate` computes; this version is not supported"
            )
    for watched in WATCHED:
        found = model.__dict__.get(watched.name)
        if not isinstance(found, watched):
            model.__dict__[watched.name] = watched(model, here, found)
        elif found.here is not here:
            model.__dict__[watched.name] = watched(model, here, found.inner)
