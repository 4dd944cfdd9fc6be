"""`share`: a model under a policy, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.forward_rows import RowRules, build_batch, on_device
from carpool.hosts.transformers.hooks import Attachment, attach
from carpool.hosts.transformers.layers import MoELayer
from carpool.hosts.transformers.plans import Prepared, prepare
from carpool.hosts.transformers.router_check import check
from carpool.plans.counters import Counters, LayerReport
from carpool.plans.grammar import Plan, parse
from carpool.plans.pipeline import Outcome, route
from carpool.plans.policy_file import PolicyFile
from carpool.policies.base import Policy
from carpool.routing.batch import Batch, Grouping
from carpool.routing.spec import Routing

if TYPE_CHECKING:
    from carpool.artefacts.statistics import Statistics

Observer = Callable[[int, Batch, Outcome], None]


class Run:
    """What happens while a model shares experts.

    Attributes:
        plan: the policy and its guards (layers may have settings of their own).
        layers: the model's MoE layers.
        batch: if set, the rows of every following forward; None reads them from the forward's arguments.
    """

    def __init__(
        self,
        attachment: Attachment,
        plan: Plan,
        rules: RowRules,
        prepared: list[Prepared],
        batch: Batch | None,
        observe: Observer | None,
    ) -> None:
        self.plan = plan
        self.layers: list[MoELayer] = attachment.layers
        self.batch = batch
        self._rules = rules
        self._prepared = prepared
        self._finished = attachment.finished
        self._observe = observe
        self._checked: set[int] = set()
        self._current: Batch | None = None
        self._seen: set[int] = set()
        self._left: dict[int, Routing] = {}  # by layer, what the next call of its experts leaves to surrogates
        self._counters, self._place = _counters(self.layers)

    @property
    def grouping(self) -> Grouping:
        """Which rows share, for loops that set `batch` themselves."""
        return self._rules.grouping

    def report(self) -> list[LayerReport]:
        """Totals of every layer since the run began."""
        rows = [counters.report() for counters in self._counters]
        return [rows[which][place] for which, place in self._place]

    def changed_rows(self) -> int:
        """Rows, summed over layers, that were routed otherwise than natively."""
        return sum(layer.rows_changed for layer in self.report())

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model's forward: find out who the rows are."""
        self._seen, self._left = set(), {}
        finished_B = None if self._finished is None else self._finished.rows_B
        self._current = build_batch(self._rules, args, kwargs, finished_B) if self.batch is None else self.batch

    def end(self) -> None:
        """After the model's forward; raises CarpoolError if a layer's router was not called in it."""
        self._current = None
        if len(self._seen) != len(self.layers):
            missing = [layer for position, layer in enumerate(self.layers) if position not in self._seen]
            raise _never_fired(missing, "a forward")
        if self._left:
            raise CarpoolError(
                f"{self.layers[min(self._left)].name} did not call its experts module after its router, so that the "
                "surrogates' output could not be added; load the model without kernels that replace the block"
            )

    def reroute(self, position: int, args: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        """A router's output with the plan's weights and ids in place of its own."""
        layer = self.layers[position]
        logits_NE, native = layer.routed(output)
        if position not in self._checked and not torch.compiler.is_compiling():
            check(layer, logits_NE, native)
            self._checked.add(position)
        batch = self._rows(layer, logits_NE)
        hidden_NH = args[0].reshape(-1, args[0].shape[-1]) if args else None
        plan, stats, surrogates = self._prepared[position]
        outcome = route(plan, layer.spec, logits_NE, batch, native=native, stats=stats, hidden_NH=hidden_NH)
        which, place = self._place[position]
        with torch.no_grad():
            self._counters[which].add(place, batch, outcome)
        self._seen.add(position)
        if surrogates is not None:
            self._left[position] = outcome.routing
        if self._observe is not None:
            self._observe(position, batch, outcome)
        _, weights, ids = layer.unpack(output)
        slots = list(output)
        slots[weights] = outcome.routing.weights_NK.reshape(output[weights].shape)
        slots[ids] = outcome.routing.ids_NK.reshape(output[ids].shape)
        return tuple(slots)

    def supplement(self, position: int, args: tuple[Any, ...], output: Any) -> Any:
        """The output of a layer's experts with that of the surrogates added; `args[0]` is their input."""
        routing = self._left.pop(position, None)
        if routing is None:
            return output
        hidden, surrogates = args[0], self._prepared[position].surrogates
        if surrogates is None or not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise CarpoolError(
                f"{self.layers[position].name}: its experts do not return one sum a row, to which the surrogates' "
                f"output could be added; use another policy than {self._prepared[position].plan}"
            )
        ids_NK, weights_NK = routing.surrogate_ids_NK, routing.surrogate_weights_NK
        assert ids_NK is not None
        assert weights_NK is not None
        added_NH = surrogates(hidden.reshape(-1, hidden.shape[-1]), ids_NK, weights_NK)
        return output + added_NH.to(output.dtype).reshape(output.shape)

    def surrogate_shares(self) -> list[float]:
        """Bytes of one surrogate over those of one expert, by layer; 0 without surrogates. Experts count at most two
        bytes a number, or a model held in fp32 for accuracy would make its surrogates look small."""
        shares = []
        for layer, prepared in zip(self.layers, self._prepared, strict=True):
            size = sum(p.numel() * min(p.element_size(), 2) for p in layer.experts.parameters()) / layer.num_experts
            shares.append(0.0 if prepared.surrogates is None else prepared.surrogates.bytes / size)
        return shares

    def _rows(self, layer: MoELayer, logits_NE: Tensor) -> Batch:
        batch = self._current if self.batch is None else self.batch
        if batch is None:
            raise CarpoolError(
                f"{layer.name} ran outside the model's forward, so nobody said who its rows are; "
                "call the model, or set run.batch"
            )
        if len(batch.group_N) != len(logits_NE):
            raise CarpoolError(
                f"{layer.name} routes {len(logits_NE)} rows, but the batch has {len(batch.group_N)}; "
                "set run.batch to the rows this layer sees"
            )
        return on_device(batch, logits_NE.device)


@contextmanager
def share(
    model: nn.Module,
    plan: str | Policy | Plan | PolicyFile,
    *,
    group: str | Grouping = "batch",
    stats: str | Path | Statistics | None = None,
    batch: Batch | None = None,
    observe: Observer | None = None,
    exempt_prefill: bool = True,
    pad_token_id: int | None = None,
) -> Iterator[Run]:
    """Let the rows of a model's batches share experts inside a `with` block; outside it the model is stock.

    Args:
        model: a transformers model of a known family; compile it after `attach`, if at all.
        plan: a policy with guards, such as `"xshare(budget=16) | floor(0.3)"`, or a `PolicyFile`.
        group: which rows share: `batch`, `request` (a row of the batch), `block:n`, or `position` (a forward over
            several positions stands for as many decoding steps).
        stats: statistics of `carpool calibrate`, for policies that need them; a policy file names its own.
        batch: who the rows of the next forwards are, instead of reading it from their arguments.
        observe: called after every layer's routing with the layer's place, the batch and the outcome.
        exempt_prefill: rows of a prompt keep their native routing. Verification passes of assisted decoding have
            several rows a request too, hence count as prompt; pass False to share in them.
        pad_token_id: what finished sequences are fed; default: the model's generation settings.

    Raises:
        CarpoolError: what `attach` raises; a bad plan; missing or foreign statistics; a block inside another of the
            same model; a router that was not called in a forward, or in none at all.
    """
    attachment = attach(model)
    if attachment.run is not None:
        raise CarpoolError(f"{type(model).__name__} already shares under {attachment.run.plan}; leave that block first")
    policies = plan if isinstance(plan, PolicyFile) else PolicyFile(parse(plan))
    pad = _pad_token(model) if pad_token_id is None else pad_token_id
    rules = RowRules(Grouping.parse(group), exempt_prefill, pad)
    run = Run(attachment, policies.plan, rules, prepare(policies, attachment.layers, stats), batch, observe)
    attachment.run = run
    try:
        yield run
    finally:
        attachment.run = None
    # only where the block did not raise: an error of the user's own must not be hidden
    silent = [layer for layer, row in zip(run.layers, run.report(), strict=True) if row.calls == 0]
    if silent:
        raise _never_fired(silent, "the whole block")


def _never_fired(layers: list[MoELayer], where: str) -> CarpoolError:
    return CarpoolError(
        f"armed but never fired: the router of {layers[0].name} and {len(layers) - 1} more was not called in {where}. "
        "Either the model did not run, or its block is replaced by a kernel that routes by itself (mxfp4: load with "
        "dequantize=True; use_kernels), or it was compiled before attach(model)"
    )


def _pad_token(model: nn.Module) -> int | None:
    """What `generate` feeds finished sequences: the pad token, or the first end token where there is none."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            token = getattr(settings, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    return None


def _counters(layers: list[MoELayer]) -> tuple[list[Counters], list[tuple[int, int]]]:
    """One set of counters a device, and each layer's set and place in it."""
    names: dict[torch.device, list[str]] = {}
    place = []
    for layer in layers:
        device = layer.weight_EH.device
        mine = names.setdefault(device, [])
        place.append((list(names).index(device), len(mine)))
        mine.append(layer.name)
    return [Counters(given, device) for device, given in names.items()], place
