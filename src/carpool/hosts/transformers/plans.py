"""Each layer's plan and statistics, checked against the model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.experts.stored import NAMES, StoredExperts
from carpool.experts.surrogates import Surrogates
from carpool.hosts.transformers.layers import MoELayer, identity
from carpool.hosts.transformers.planes import PlanesExperts
from carpool.plans.grammar import Plan
from carpool.plans.policy_file import PolicyFile
from carpool.routing.spec import ALL_BITS

if TYPE_CHECKING:
    from carpool.artefacts.identity import Identity
    from carpool.artefacts.statistics import Statistics


class Prepared(NamedTuple):
    """What a layer runs with.

    Attributes:
        plan: the layer's. stats: what it made of the statistics.
        native: bytes of an expert as the checkpoint stores it, over those in 16 bits; 1 where it is not quantised.
        sizes: what reading an expert at a depth takes over what stock reads for it, float64 `[17]` by depth.
        surrogates: if the plan leaves pairs to some. stored: experts in planes beside those of the model, if the plan
            reads them at depths; those in planes themselves are read in their place.
    """

    plan: Plan
    stats: Mapping[str, Tensor]
    native: float
    sizes: Tensor
    surrogates: Surrogates | None = None
    stored: StoredExperts | None = None


def prepare(
    policies: PolicyFile,
    layers: list[MoELayer],
    stats: str | Path | Statistics | None,
    own: Path | None,
    native: Sequence[float],
) -> list[Prepared]:
    """Plan and statistics of every layer.

    Args:
        stats: that were named. own: statistics that are part of the model's checkpoint, if none were.
        native: of every layer, see `Prepared`.

    Raises:
        CarpoolError: a plan that is impossible for a layer, statistics that are missing or of another model, a policy
            file of another model.
    """
    if stats is not None and policies.statistics is not None:
        raise CarpoolError("the policy file names its own statistics; leave out stats=...")
    policies.check_layers([layer.index for layer in layers])
    if policies.model:
        policies.check_model(identity(layers))
    plans = [policies.plan_for(layer.index) for layer in layers]
    for layer, plan in zip(layers, plans, strict=True):
        plan.check(layer.num_experts, layer.top_k)
    if not any(plan.required_stats() for plan in plans):
        return [Prepared(plan, {}, share, _sizes(None, share)) for plan, share in zip(plans, native, strict=True)]
    from carpool.artefacts.statistics import made_by

    model = identity(layers)
    in_planes = all(layer.planes is not None for layer in layers)
    loaded = _load(policies, model, stats, own, NAMES if in_planes else ())
    prepared: list[Prepared] = []
    for layer, plan, share in zip(layers, plans, native, strict=True):
        tensors = loaded.for_layer(layer.index)
        missing = [name for name in plan.required_stats() if name not in tensors]
        if missing:
            raise CarpoolError(
                f"{plan} needs the statistic {missing[0]!r}, which the statistics lack for layer {layer.index}; "
                f"make a file with `{made_by(missing[0])}` and name it: stats=..., --stats on the command line"
                + _known_domains(missing[0], tensors)
            )
        device = layer.weight_EH.device
        given = plan.prepare({name: tensor.to(device) for name, tensor in tensors.items()})
        surrogates = Surrogates.of(tensors, device) if plan.policy.surrogates else None
        if not plan.reads_depths:
            prepared.append(Prepared(plan, given, share, _sizes(None, share), surrogates))
        elif layer.planes is not None:
            layer.planes.check_depths(StoredExperts.depths_in(tensors), plan)
            prepared.append(Prepared(plan, given, share, _sizes(layer.planes, share), surrogates))
        else:
            stored = StoredExperts.of(tensors, device)
            prepared.append(Prepared(plan, given, share, _sizes(stored, share), surrogates, stored))
    return prepared


def _sizes(stored: StoredExperts | PlanesExperts | None, native: float) -> Tensor:
    found = torch.zeros(ALL_BITS + 1, dtype=torch.float64, device="cpu")
    if stored is not None:
        found = stored.sizes / native
    found[ALL_BITS] = 1  # the experts as stock has them
    return found


def missing_statistics(plan: Plan | PolicyFile) -> CarpoolError:
    """What to say to somebody who gave none."""
    from carpool.artefacts.statistics import made_by

    name = plan.required_stats()[0]
    return CarpoolError(
        f"{plan} needs the statistic {name!r}; "
        f"make it with `{made_by(name)}` and pass stats='stats.safetensors' (--stats on the command line)"
    )


def _load(
    policies: PolicyFile,
    model: Identity,
    stats: str | Path | Statistics | None,
    own: Path | None,
    leave: tuple[str, ...],
) -> Statistics:
    from carpool.artefacts.shipped import shipped_with
    from carpool.artefacts.statistics import Statistics

    source = policies.statistics if stats is None else stats
    if source is None:
        source = own or shipped_with(model)
    if source is None:
        raise missing_statistics(policies)
    loaded = source if isinstance(source, Statistics) else Statistics.load(source, leave)
    if caveat := loaded.check(model):
        _warn_once(caveat)
    return loaded


@functools.cache
def _warn_once(said: str) -> None:
    logging.getLogger("carpool").warning(said)


def _known_domains(name: str, tensors: Mapping[str, Tensor]) -> str:
    """What could have been meant by a statistic of an unknown domain."""
    kind, slash, _ = name.partition("/")
    known = sorted(other.removeprefix(kind + "/") for other in tensors if other.startswith(kind + "/"))
    return f" (its domains are {', '.join(map(repr, known))})" if slash and known else ""
