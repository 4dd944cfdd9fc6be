"""Runners load the models of a pool and ask them. Each engine is imported only where a pool has one of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager

from carpool.models.pool import Expert
from carpool.models.schedule import Runner


def open_runner(expert: Expert) -> AbstractContextManager[Runner]:
    """The model of an expert, loaded for the time of a block.

    Raises:
        CarpoolError: an engine that is not installed, a model or server that is not there.
    """
    if expert.engine == "server":
        from carpool.models.runners.server import served

        return served(expert)
    if expert.engine == "vllm":
        from carpool.models.runners.vllm_process import in_a_process

        return in_a_process(expert)
    from carpool.models.runners.in_transformers import loaded

    return loaded(expert)
