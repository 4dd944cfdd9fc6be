"""What the plugin does in a process that vLLM starts: arm what builds its parts, where the configuration is seen.

Without the key `carpool` in `additional_config` what is armed does what it did before, and nothing else is
patched. `CARPOOL_DISABLE=1` keeps even them untouched, whatever the configuration says.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from carpool import __version__
from carpool.errors import CarpoolError
from carpool.hosts.engine.log import log, log_as
from carpool.hosts.engine.near_keys import warn
from carpool.hosts.engine.off import switched_off
from carpool.hosts.engine.refusal import end_with_the_sentence
from carpool.hosts.engine.request_keys import check_request, mark_samples
from carpool.hosts.engine.settings import KEY, Settings, configured
from carpool.hosts.vllm.placement import PLACEMENT, require_placement, use_placement

MARK = "carpool_version"
_missing: list[str] = []  # of `PLACES`, in this process


def arm() -> None:
    """Arm what builds configuration and requests (front end), scheduler (engine core) and worker; once per process.

    A vLLM that has moved one of them still runs, as long as it is not asked to share.
    """
    log_as("vllm.carpool")  # vLLM shows loggers of its own name only
    if switched_off():
        return
    for module, owner, name, then in PLACES:
        try:
            _arm(getattr(importlib.import_module(module), owner), name, then)
        except (ImportError, AttributeError):
            _missing.append(f"{module}.{owner}.{name}")
            log().warning("carpool cannot work with this vLLM: no %s", _missing[-1])
    from carpool.hosts.vllm.planes import register_method

    register_method()


def _arm(owner: type, name: str, then: Callable[..., None]) -> None:
    original = getattr(owner, name)
    if hasattr(original, "carpool_original"):
        return

    @functools.wraps(original)
    def armed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            then(self, result)
        except CarpoolError:
            end_with_the_sentence("vllm")
            raise
        return result

    armed.carpool_original = original  # type: ignore[attr-defined]  # a function may carry a mark
    setattr(owner, name, armed)


def _model_known(arguments: Any, model_config: Any) -> None:
    """In the front end, before vLLM itself may refuse the model in its own words."""
    settings = Settings.of(arguments.additional_config)
    if settings is not None:
        from carpool.hosts.vllm.engine import check_model

        check_model(model_config, settings)


def _configured(arguments: Any, config: Any) -> None:
    """In the front end: refuse early, where the user sees it, and let workers' metrics reach a server's /metrics."""
    if isinstance(config.additional_config, dict):
        warn((key for key in config.additional_config if key not in (MARK, PLACEMENT)), (KEY,), "additional_config")
    require_placement(config)
    settings = Settings.of(config.additional_config)
    if settings is None:
        return
    _refuse_if_missing()
    from carpool.hosts.vllm.engine import check_engine
    from carpool.hosts.vllm.metrics import collect_from_workers

    check_engine(config, settings)
    _mark(config)
    from vllm.engine.arg_utils import AsyncEngineArgs

    if isinstance(arguments, AsyncEngineArgs):  # `LLM` has no /metrics, and its process' own metrics stay as they are
        collect_from_workers()


def _request_processed(processor: Any, request: Any) -> None:
    """In the front end, for every request: it can be refused there, its samples are known, and what a client wrote in
    their place can be dropped.

    Raises:
        CarpoolError: see `check_request`; vLLM's own kind of a client's error at the same time, which its server
            answers with 400 and without a traceback.
    """
    if configured(processor.vllm_config.additional_config):
        try:
            check_request(request.sampling_params)
        except CarpoolError as error:
            from vllm.exceptions import VLLMClientError

            raise type("RequestError", (CarpoolError, VLLMClientError), {})(str(error)) from None
        mark_samples(request.sampling_params)


def _scheduler_built(scheduler: Any, _: None) -> None:
    if Settings.of(scheduler.vllm_config.additional_config) is None:
        return
    from carpool.hosts.vllm.one_token import count_one_token
    from carpool.hosts.vllm.prefix_cache import share_prompts_only

    share_prompts_only(scheduler)
    count_one_token(scheduler)


def _worker_built(worker: Any, _: None) -> None:
    use_placement(worker.vllm_config)
    settings = Settings.of(worker.vllm_config.additional_config)
    if settings is None:
        return
    _refuse_if_missing()
    from carpool.hosts.engine.control import Control
    from carpool.hosts.vllm.engine import check_engine
    from carpool.hosts.vllm.host import Host

    check_engine(worker.vllm_config, settings)
    _mark(worker.vllm_config)
    control = Control(Host.attach(worker, settings))
    worker.carpool_set, worker.carpool_report = control.set, control.report


def _mark(config: Any) -> None:
    """vLLM names cached compiled graphs by a hash that holds `additional_config`: a graph traced with the plugin must
    not be taken while the kill switch is set, nor one traced without it, nor another version's."""
    config.additional_config = {**config.additional_config, MARK: __version__}


def _refuse_if_missing() -> None:
    if _missing:
        raise CarpoolError(f"this vLLM has no {_missing[0]}, which Carpool needs; this version is not supported")


PLACES: tuple[tuple[str, str, str, Callable[..., None]], ...] = (
    ("vllm.engine.arg_utils", "EngineArgs", "create_model_config", _model_known),
    ("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", _configured),
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", _request_processed),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "__init__", _scheduler_built),
    ("vllm.v1.worker.worker_base", "WorkerBase", "__init__", _worker_built),
)
