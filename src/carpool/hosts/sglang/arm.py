"""What the plugin does in a process that SGLang starts: hook the places where the configuration is seen.

SGLang logs what a plugin raises and goes on, and it does not say when a hook finds no target. So nothing is decided
here: what is hooked passes everything through unless the key `carpool` is in `json_model_override_args`, and then
refuses where an error ends the server. `CARPOOL_DISABLE=1` hooks nothing.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.log import log, log_as
from carpool.hosts.engine.off import switched_off
from carpool.hosts.engine.refusal import end_with_the_sentence, runs_in
from carpool.hosts.sglang.configuration import PLACE, settings_of

SERVER = "sglang.srt.entrypoints.http_server"
_missing: list[str] = []  # of the targets, in this process
_hooked: set[str] = set()


def arm() -> None:
    """Hook what resolves a server's arguments, what loads the model and what schedules; once per process."""
    log_as("carpool")
    if switched_off():
        return
    around("sglang.srt.server_args.ServerArgs.resolve_once", _resolved)
    around("sglang.srt.model_executor.model_runner.ModelRunner.initialize", _initialized)
    around("sglang.srt.managers.scheduler.Scheduler.__init__", _scheduler_built)
    asked = any(PLACE in given.replace("-", "_") for given in sys.argv)
    if "sglang.srt.server_args.ServerArgs.resolve_once" in _missing and asked:
        raise SystemExit(
            f"carpool: this SGLang has no {_missing[0]}, which Carpool needs; this version is not supported"
        )


def around(target: str, hook: Callable[..., Any]) -> None:
    """Wrap a function or method by SGLang's registry, which applies it with all other plugins' hooks.

    Args:
        target: its dotted name.
        hook: called with the original and its arguments.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if target in _hooked:
        return
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        _missing.append(target)
        log().warning("carpool cannot work with this SGLang: no %s", target)
        return
    _hooked.add(target)
    if target in HookRegistry._patched:  # by another plugin, and the registry wraps a target once only
        HookRegistry._apply_target(target, [(HookType.AROUND, hook, None)])
    else:
        HookRegistry.register(target, hook, HookType.AROUND)


def apply() -> None:
    """Apply what was hooked since SGLang did so itself.

    Raises:
        CarpoolError: a target is not there, or SGLang could not hook it.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    lost = _missing + sorted(_hooked - HookRegistry._patched)
    if lost:
        raise CarpoolError(f"this SGLang has no {lost[0]}, which Carpool needs; this version is not supported")


def _resolved(original: Callable[..., Any], arguments: Any) -> Any:
    """In every process, at first in the front end: refuse where the user sees it."""
    before = getattr(arguments, "_resolution_finished", False)
    result = original(arguments)
    if before:
        return result
    try:
        settings = settings_of(arguments)
        if settings is not None:
            from carpool.hosts.sglang.engine import check_engine
            from carpool.hosts.sglang.requests import follow_requests
            from carpool.hosts.sglang.route import add_route

            apply()
            check_engine(arguments, settings)
            follow_requests()
            if SERVER in sys.modules or runs_in("sglang"):
                add_route()
    except CarpoolError:
        end_with_the_sentence("sglang")
        raise
    return result


def _initialized(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """In a scheduler's process: the target model is loaded here, before anything is sized or recorded."""
    settings = None if runner.is_draft_worker else settings_of(runner.server_args)
    result = original(runner, *args, **kwargs)
    if settings is not None:
        from carpool.hosts.sglang.engine import check_engine
        from carpool.hosts.sglang.host import Host

        try:
            check_engine(runner.server_args, settings)
            Host.attach(runner, settings)
        except CarpoolError as error:  # SGLang shows a traceback, and ends
            log().error("carpool: %s", error)
            raise
    return result


def _scheduler_built(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    original(scheduler, *args, **kwargs)
    host = getattr(scheduler.tp_worker.model_runner, "carpool", None)
    if host is not None:
        from carpool.hosts.sglang.control import attach

        attach(scheduler, host)
