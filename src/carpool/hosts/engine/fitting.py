"""Does what the user gave fit the model: plans its layers, statistics and policy files its weights?"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch
from torch import Tensor

from carpool.artefacts.identity import Identity, fingerprint
from carpool.artefacts.statistics import Statistics, made_by
from carpool.errors import CarpoolError
from carpool.experts.stored import NAMES, SHAPE, StoredExperts
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.log import log
from carpool.plans.grammar import Plan
from carpool.plans.pipeline import route
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Batch

REHEARSED = 8  # rows
Gates = dict[str, Tensor | None]  # the weight of every layer's gate, by the layer's name; None where it cannot be read


def check_plan(plan: Plan, in_planes: bool) -> None:
    """Raises CarpoolError for a plan that an engine cannot run with a model.

    Args:
        in_planes: whether its experts are planes of bits.
    """
    if plan.reads_depths and not in_planes:
        raise CarpoolError(
            f"{plan} reads experts at depths, and this checkpoint holds them as whole weights; make one that does not "
            "with `carpool compress MODEL --output DIR`, and serve that"
        )


def check_fit(plan: Plan, num_experts: int, top_k: int, statistics: Container[str], in_planes: bool = False) -> None:
    """Refuse a plan that a layer cannot run.

    Args:
        plan: of the layer.
        num_experts, top_k: `E` and `K` of the layer.
        statistics: names of those that were loaded for it.
        in_planes: whether its experts are planes of bits.

    Raises:
        CarpoolError: impossible for `E` and `K`, reads experts at depths, or needs statistics that are not there.
    """
    plan.check(num_experts, top_k)
    check_plan(plan, in_planes)
    missing = [name for name in plan.policy.required_stats() if name not in statistics]
    if missing:
        raise CarpoolError(
            f"{plan.policy} needs the statistics {missing[0]!r}; make them with `{made_by(missing[0])}` and name the "
            'file with "stats" when the engine starts, or in a policy file'
        )


def check_counts(policies: PolicyFile, num_experts: int, top_k: int, planes: Path | None = None) -> None:
    """Refuse what the user gave by a model's configuration alone.

    Args:
        num_experts, top_k: as the configuration says.
        planes: the checkpoint's own file of experts in planes.

    Raises:
        CarpoolError: a policy or files that do not fit.
    """
    policies.check_counts({"num_experts": num_experts, "top_k": top_k})
    source = policies.statistics or planes
    known = () if source is None else Statistics.names_in(source)
    for plan in policies.plans:
        check_fit(plan.for_serving(), num_experts, top_k, known, planes is not None)


def as_served(statistics: Mapping[str, Tensor], stored: tuple[int, ...]) -> dict[str, Tensor]:
    """A layer's statistics with the depths at which its experts are served; as they are where these are no planes.

    Raises:
        CarpoolError: the statistics are of experts with depths that are not served.
    """
    if not stored:
        return dict(statistics)
    found = StoredExperts.depths_in(statistics) if SHAPE in statistics else stored
    if not set(found) <= set(stored):
        raise CarpoolError(
            f"the statistics are of experts at {list(found)} bits, and the checkpoint's are stored at {list(stored)}: "
            "leave the file of statistics out (the checkpoint brings its own), or serve the checkpoint that it is of"
        )
    return {SHAPE: torch.tensor([0, 0, 0, *stored])} | dict(statistics)


def prepare(layer: Layer, plan: Plan) -> dict[str, Tensor]:
    """What a plan needs of the layer's statistics, on the layer's device; checks the plan too.

    Raises:
        CarpoolError: the plan does not fit the layer, or needs statistics that were not loaded or facts that an
            engine does not give.
    """
    stored = layer.experts.depths
    check_fit(plan, layer.num_experts, layer.spec.top_k, layer.statistics, bool(stored))
    given = plan.prepare(as_served(layer.statistics, stored))
    stats = {name: tensor.to(layer.device) for name, tensor in given.items()}
    _rehearse(layer, plan, stats)
    if plan.policy.surrogates and layer.resident is None:
        if layer.stand_ins is None:
            raise CarpoolError(
                f"{plan.policy} computes surrogates beside the experts, which this engine's host does not"
            )
        layer.resident = layer.stand_ins(layer)
    return stats


def _rehearse(layer: Layer, plan: Plan, stats: dict[str, Tensor]) -> None:
    """Run the plan once on made-up rows: what it cannot do here it must not find out while serving."""
    logits_NE = torch.randn(REHEARSED, layer.num_experts, generator=torch.Generator().manual_seed(0)).to(layer.device)
    request_N = torch.arange(REHEARSED, device=layer.device) // 2
    batch = Batch.of(REHEARSED, device=layer.device, request_N=request_N, num_requests=REHEARSED)
    hidden_NH = torch.zeros(REHEARSED, layer.hidden_size, device=layer.device)
    route(plan, layer.spec, logits_NE, batch, stats=stats, hidden_NH=hidden_NH)


def load_statistics(
    policies: PolicyFile, layers: list[Layer], gates: Gates, own: Path | None = None
) -> Statistics | None:
    """The statistics file, if the settings name one or the checkpoint brings its own, and it is of this model.

    Args:
        own: the checkpoint's own file of experts in planes, with what policies need to know of them.

    Raises:
        CarpoolError: unreadable, damaged or of another model; or a policy file of another model or other layers.
    """
    policies.check_layers([layer.index for layer in layers])
    source = policies.statistics or own
    if source is None and not policies.model:
        return None
    # planes are left to the experts, which read them themselves
    statistics = None if source is None else Statistics.load(source, leave=NAMES)
    caveat = _check_model(policies, statistics, layers, gates)
    if caveat and source != own:  # what the checkpoint brings was made with its experts
        log().warning(caveat)
    return statistics


def differ(policies: PolicyFile, layers: list[Layer], gates: Callable[[], Gates]) -> str:
    """Why the files do not describe the weights that the model has now, after others were loaded into it; empty if they
    do. What cannot be compared does not count as the same, as it does in an engine that starts with it."""
    if not policies.model and layers[0].source is None:
        return ""
    try:
        return _check_model(policies, layers[0].source, layers, gates())
    except CarpoolError as error:
        return str(error)


def _check_model(policies: PolicyFile, statistics: Statistics | None, layers: list[Layer], gates: Gates) -> str:
    """What could not be compared; raises CarpoolError for files of another model."""
    weights = [(layer.index, gate) for layer in layers if (gate := gates[layer.name]) is not None]
    if len(weights) < len(layers):
        raise CarpoolError("the gates of this model cannot be read, so statistics and policy files cannot be checked")
    first = layers[0]
    mine = Identity(
        fingerprint=fingerprint(weights),
        layers=tuple(layer.index for layer in layers),
        num_experts=first.num_experts,
        top_k=first.spec.top_k,
        hidden_size=first.experts.hidden_size,
        samples={layer.index: layer.sample() for layer in layers},
    )
    policies.check_model(mine)
    return "" if statistics is None else statistics.check(mine)
