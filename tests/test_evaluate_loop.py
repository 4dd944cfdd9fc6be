"""The measuring loop's refusals, in everything that stands on it: lockstep, denoising and tune's trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lockstep_tools import VOCABULARY, small_model

from carpool.errors import CarpoolError
from carpool.evaluate import lockstep
from carpool.evaluate.denoising import BlockLayout, denoise
from carpool.evaluate.interference import interference
from carpool.evaluate.intervals import FEWEST
from carpool.evaluate.layout import Layout
from carpool.evaluate.measure import measure
from carpool.evaluate.sequences import Sequences
from carpool.evaluate.study import describe
from carpool.hosts.transformers import hooks
from carpool.plans.grammar import parse
from carpool.routing.batch import Grouping
from carpool.tune import Trials

MODEL = small_model()
MASK = VOCABULARY - 1
BATCH = Grouping.parse("batch")
LAYOUT = Layout(4, 12, 4, BATCH)
IDS = torch.randint(2, MASK, (16, 13), generator=torch.Generator().manual_seed(0))
SEQUENCES = Sequences(IDS, torch.arange(16) % 2, ("a", "b"))
MOE = describe(MODEL)


def measured(policy: str, **given: Any) -> Any:
    return measure(MODEL, MOE, [parse(policy)], SEQUENCES, LAYOUT, 4, **given)


def denoised(policy: str, **given: Any) -> Any:
    return denoise(MODEL, MOE, [parse(policy)], SEQUENCES, BlockLayout.of(4, 4, 8, 4, BATCH), 4, MASK, **given)


def tried(policy: str) -> Any:
    many = Sequences(IDS.repeat(3, 1)[:40], torch.arange(40) % 2, ("a", "b"), FEWEST)
    return Trials(MODEL, MOE, many, LAYOUT).measure([parse(policy)])


def interfered(policy: str) -> Any:
    return interference(MODEL, MOE, [parse(policy)], SEQUENCES, LAYOUT, 2)


@pytest.mark.parametrize("loop", [measured, denoised, tried, interfered])
def test_routing_that_never_reaches_the_experts_is_found(monkeypatch: pytest.MonkeyPatch, loop: Callable) -> None:
    """Negative control: the host decides and counts, but the experts get the router's own output."""
    loop("oea(k0=1)")
    honest = hooks._Reroute.__call__

    def bypassed(self: Any, module: Any, args: Any, output: Any) -> Any:
        honest(self, module, args, output)
        return output

    monkeypatch.setattr(hooks._Reroute, "__call__", bypassed)
    with pytest.raises(CarpoolError, match="its routing does not reach the experts"):
        loop("oea(k0=1)")


@pytest.mark.parametrize("loop", [measured, denoised, tried, interfered])
def test_a_layer_that_does_not_report_is_found(monkeypatch: pytest.MonkeyPatch, loop: Callable) -> None:
    honest = lockstep.Watch.__call__

    def deaf(self: Any, layer: int, *given: Any) -> None:
        if layer:
            honest(self, layer, *given)

    monkeypatch.setattr(lockstep.Watch, "__call__", deaf)
    with pytest.raises(CarpoolError, match="ran in 1 of 2 MoE layers"):
        loop("oea(k0=1)")


@pytest.mark.parametrize("loop", [measured, denoised, tried])
def test_counting_that_changes_stock_is_found(monkeypatch: pytest.MonkeyPatch, loop: Callable) -> None:
    """Negative control: under any plan, stock's too, the experts get other weights than the router's."""
    honest = hooks._Reroute.__call__

    def altered(self: Any, module: Any, args: Any, output: Any) -> Any:
        made = honest(self, module, args, output)
        return made if made is output else (made[0], made[1] * 1.001, made[2])

    monkeypatch.setattr(hooks._Reroute, "__call__", altered)
    with pytest.raises(CarpoolError, match="counting the experts that stock reads changed the model's logits"):
        loop("oea(k0=1)")


@pytest.mark.parametrize("loop", [measured, denoised])
def test_a_plan_that_changes_no_row_is_refused_unless_allowed(loop: Callable) -> None:
    with pytest.raises(CarpoolError, match=r"oea\(k0=2\) changed no row at batch 4 grouped by batch"):
        loop("oea(k0=2)")
    loop("oea(k0=2)", allow_unchanged=True)
    loop("xshare(budget=8)")  # a budget that holds everything need not act


@pytest.mark.parametrize("loop", [measured, denoised, tried])
def test_plans_that_do_not_fit_are_refused(loop: Callable) -> None:
    with pytest.raises(CarpoolError, match="asks for 9 of 8 experts"):
        loop("xshare(budget=9)")
