"""One forward of a model under a plan: who its rows are, and what becomes of them in each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.transformers.forward_rows import on_device
from carpool.hosts.transformers.layers import MoELayer
from carpool.hosts.transformers.plans import Prepared
from carpool.hosts.transformers.router_check import check
from carpool.plans.counters import Counters, LayerReport
from carpool.plans.pipeline import Outcome, route
from carpool.routing.batch import Batch
from carpool.routing.spec import ALL_BITS, Routing

Observer = Callable[[int, Batch, Outcome], None]


@dataclass(frozen=True, eq=False)
class Terms:
    """What the forwards of a run have in common.

    Attributes:
        layers: the model's MoE layers.
        prepared: the plan and statistics of each.
        observe: called after every layer's routing.
        checked: layers whose router was compared with its rule on real logits.
    """

    layers: list[MoELayer]
    prepared: list[Prepared]
    observe: Observer | None
    checked: set[int] = field(default_factory=set)


class Tally:
    """Counters of every layer: one set a device."""

    def __init__(self, layers: list[MoELayer]) -> None:
        names: dict[torch.device, list[str]] = {}
        self._place: list[tuple[int, int]] = []
        for layer in layers:
            device = layer.weight_EH.device
            mine = names.setdefault(device, [])
            self._place.append((list(names).index(device), len(mine)))
            mine.append(layer.name)
        self._counters = [Counters(given, device) for device, given in names.items()]
        self._deep: dict[int, Tensor] = {}  # by layer, bytes of experts that were read in planes, in experts of stock's

    def add(self, position: int, batch: Batch, outcome: Outcome) -> None:
        which, place = self._place[position]
        with torch.no_grad():
            self._counters[which].add(place, batch, outcome)

    def add_bytes(self, position: int, outcome: Outcome, batch: Batch, sizes: Tensor) -> None:
        """Count what real rows read of experts in planes; `sizes [17]` is an expert at each depth over stock's."""
        pairs_NK = (outcome.routing.weights_NK != 0) & batch.real_N.unsqueeze(-1)
        read = sizes.to(pairs_NK.device)[outcome.depth_of(pairs_NK)].sum()
        self._deep[position] = self._deep.get(position, torch.zeros_like(read)) + read

    def whole_experts(self, report: list[LayerReport]) -> list[float]:
        """Bytes that every layer has read, in experts as stock reads them."""
        return [float(self._deep.get(position, row.union)) for position, row in enumerate(report)]

    def report(self) -> list[LayerReport]:
        rows = [counters.report() for counters in self._counters]
        return [rows[which][place] for which, place in self._place]


class Forward:
    """The state of one forward, from the model's first module to its last.

    Attributes:
        batch: who its rows are; None if nobody said.
        early: it may leave the model after its first layers, as drafts of the model itself do.
    """

    def __init__(self, terms: Terms, tally: Tally, batch: Batch | None, early: bool = False) -> None:
        self.terms, self.tally, self.batch, self.early = terms, tally, batch, early
        self._again = False
        self._seen: set[int] = set()
        self._left: dict[int, Routing] = {}  # by layer, what the next call of its experts does not do itself
        self._whole: dict[int, Tensor] = {}  # by layer, the input of experts that were called with one row

    def again(self) -> Forward:
        """The same rows, computed a second time: what is decided is the same, and is not counted again."""
        second = Forward(self.terms, self.tally, self.batch, self.early)
        second._again = True
        return second

    def reroute(self, position: int, args: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        """A router's output with the plan's weights and ids in place of its own."""
        layer, terms = self.terms.layers[position], self.terms
        logits_NE, native = layer.routed(output)
        if position not in terms.checked and not torch.compiler.is_compiling():
            check(layer, logits_NE, native)
            terms.checked.add(position)
        batch = self._rows(layer, logits_NE)
        if layer.planes is not None and layer.planes.free_E is not None:
            batch = replace(batch, free_E=layer.planes.free_E())
        hidden_NH = args[0].reshape(-1, args[0].shape[-1]) if args else None
        prepared = terms.prepared[position]
        outcome = route(
            prepared.plan, layer.spec, logits_NE, batch, native=native, stats=prepared.stats, hidden_NH=hidden_NH
        )
        self._seen.add(position)
        if prepared.surrogates is not None or prepared.plan.reads_depths:
            self._left[position] = outcome.routing
        if not self._again:
            self.tally.add(position, batch, outcome)
            if prepared.plan.reads_depths:
                self.tally.add_bytes(position, outcome, batch, prepared.sizes)
            if terms.observe is not None:
                terms.observe(position, batch, outcome)
        _, weights, ids = layer.unpack(output)
        slots = list(output)
        slots[weights] = outcome.routing.weights_NK.reshape(output[weights].shape)
        slots[ids] = outcome.routing.ids_NK.reshape(output[ids].shape)
        return tuple(slots)

    def before(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What a layer's experts are called with in place of their arguments: those in planes with the depth of every
        pair; those beside planes with one row, for its shape, where planes give all that is needed. None: as it is."""
        routing, prepared = self._left.get(position), self.terms.prepared[position]
        if routing is None or routing.depth_NK is None:
            return None
        if self.terms.layers[position].planes is not None:
            if prepared.surrogates is None:
                del self._left[position]
            return args, {**kwargs, "depth_NK": routing.depth_NK}
        given = (*args, *kwargs.values())
        flat = all(isinstance(one, Tensor) and one.dim() == 2 and len(one) == len(given[0]) for one in given)
        read_NK = routing.weights_NK != 0
        shallow = (read_NK & (routing.depth_NK < ALL_BITS)).any(-1).all() & ~(
            read_NK & (routing.depth_NK == ALL_BITS)
        ).any()
        if not flat or not shallow:
            return None
        self._whole[position] = given[0]
        return tuple(one[:1] for one in args), {name: one[:1] for name, one in kwargs.items()}

    def supplement(self, position: int, args: tuple[Any, ...], output: Any) -> Any:
        """What a layer's experts give with each pair at its depth, and with the surrogates' output added; `args[0]` is
        the experts' input."""
        routing = self._left.pop(position, None)
        if routing is None:
            return output
        layer, hidden, prepared = self.terms.layers[position], args[0], self.terms.prepared[position]
        surrogates, stored = prepared.surrogates, prepared.stored
        if position in self._whole and isinstance(output, Tensor):
            hidden = self._whole.pop(position)
            output = output.new_zeros(len(hidden), *output.shape[1:])  # of rows that take nothing from it
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise CarpoolError(
                f"{layer.name}: its experts do not return one sum a row, which could be computed at a depth or with "
                f"surrogates; use another policy than {prepared.plan}"
            )
        hidden_NH, made_NH = (one.reshape(-1, hidden.shape[-1]) for one in (hidden, output))
        if stored is not None:
            assert routing.depth_NK is not None
            made_NH = stored.output(
                layer.experts, hidden_NH, routing.ids_NK, routing.weights_NK.to(hidden.dtype), routing.depth_NK, made_NH
            )
        if surrogates is not None:
            assert routing.surrogate_ids_NK is not None
            assert routing.surrogate_weights_NK is not None
            added_NH = surrogates(hidden_NH, routing.surrogate_ids_NK, routing.surrogate_weights_NK)
            made_NH = made_NH + added_NH.to(output.dtype)
        return made_NH.reshape(output.shape)

    def end(self) -> None:
        """After the model's last module; raises CarpoolError if a layer's router was not called."""
        layers, last = self.terms.layers, max(self._seen, default=0)
        if len(self._seen) != (last + 1 if self.early else len(layers)):
            missing = [layer for position, layer in enumerate(layers) if position not in self._seen]
            raise never_fired(missing, "a forward")
        if self._left:
            raise CarpoolError(
                f"{layers[min(self._left)].name} did not call its experts module after its router, so that "
                "what the plan does in their place was not done; load the model without kernels that replace the block"
            )

    def _rows(self, layer: MoELayer, logits_NE: Tensor) -> Batch:
        if self.batch is None:
            raise CarpoolError(
                f"{layer.name} ran outside the model's forward, so nobody said who its rows are; "
                "call the model, or set run.batch"
            )
        if len(self.batch.group_N) != len(logits_NE):
            raise CarpoolError(
                f"{layer.name} routes {len(logits_NE)} rows, but the batch has {len(self.batch.group_N)}; "
                "set run.batch to the rows this layer sees"
            )
        batch, device_E = on_device(self.batch, logits_NE.device), layer.device_E
        if device_E is None or batch.device_E is not None:
            return batch
        return replace(batch, device_E=device_E.to(logits_NE.device))


def never_fired(layers: list[MoELayer], where: str, else_: str = "") -> CarpoolError:
    return CarpoolError(
        f"armed but never fired: the router of {layers[0].name} and {len(layers) - 1} more was not called in {where}. "
        "Either the model did not run, or its block is replaced by a kernel that routes by itself (mxfp4: load with "
        f"dequantize=True; use_kernels), or it was compiled before it was first shared{else_}"
    )
