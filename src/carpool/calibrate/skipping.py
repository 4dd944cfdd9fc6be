"""How many experts a skipping policy skips on a text, and the threshold that skips a wanted share of them.

`N` rows, `K` experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.statistics import Statistics, made_by
from carpool.calibrate.run import BATCH_TOKENS, require_fitting
from carpool.calibrate.thresholds import threshold_for
from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan, parse
from carpool.plans.pipeline import Outcome
from carpool.routing.batch import Batch

STEPS = 200  # of the grid of thresholds
KNOBS: Mapping[str, str] = {"layer_threshold": "tau", "tail_mass": "beta", "top_p": "p"}


@dataclass(frozen=True)
class Skipping:
    """A policy that skips at least what was asked for.

    Attributes:
        plan: the policy at the threshold.
        skipped: share of (token, expert) pairs that it skips on the text.
        tried: thresholds that were measured and what they skip, ascending in the share.
    """

    plan: Plan
    skipped: float
    tried: tuple[tuple[float, float], ...]


def find_threshold(
    model: Any,
    policy: str,
    target: float,
    sequences_BT: Tensor,
    *,
    stats: Statistics | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Skipping:
    """The threshold that skips the least share of pairs that is at least `target`, on native prompts and tokens alike.

    Every threshold that is tried is a pass over the text, since skipping in one layer changes the routing of the
    next. `layer_threshold` searches among quantiles of `sensitivity * weight` on the text, the others from 0 to 1.

    Args:
        policy: `layer_threshold`, `tail_mass` or `top_p`.
        target: share of the pairs, 0 to 1; a token keeps one expert, so `1 - 1/K` is the most.
        progress: told the tokens of every pass, about `log2(STEPS) + 2` passes.

    Raises:
        CarpoolError: another policy, a share out of reach, missing statistics, or what `share` raises.
    """
    require_fitting(model, sequences_BT)
    if policy not in KNOBS:
        raise CarpoolError(f"policy {policy!r} has no threshold to search for; known: {', '.join(KNOBS)}")
    if policy == "layer_threshold":
        grid = _quantiles(model, sequences_BT, stats, progress)
    else:
        grid = [step / STEPS for step in range(STEPS + 1)]
    measured: dict[float, float] = {}

    def plan(threshold: float) -> Plan:
        value = 1 - threshold if policy == "top_p" else threshold
        return parse(f"{policy}({KNOBS[policy]}={value!r})")

    def skipped(threshold: float) -> float:
        measured[threshold] = skipped_by(model, plan(threshold), sequences_BT, stats=stats, progress=progress)
        return measured[threshold]

    best = threshold_for(skipped, target, grid)
    tried = sorted((getattr(plan(one).policy, KNOBS[policy]), share) for one, share in measured.items())
    return Skipping(plan(best), measured[best], tuple(sorted(tried, key=lambda pair: pair[1])))


def skipped_by(
    model: Any,
    plan: Plan,
    sequences_BT: Tensor,
    *,
    stats: Statistics | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Share of (token, expert) pairs of the native routing that the plan does not compute, all layers together."""
    kept = pairs = 0

    def count(place: int, batch: Batch, outcome: Outcome) -> None:
        nonlocal kept, pairs
        kept += int((outcome.routing.weights_NK != 0).sum())
        pairs += outcome.routing.weights_NK.numel()

    _passes(model, plan, sequences_BT, stats, count, progress)
    return 1 - kept / pairs


def _quantiles(
    model: Any, sequences_BT: Tensor, stats: Statistics | None, progress: Callable[[int], None]
) -> list[float]:
    """Ascending thresholds that skip from nothing to all but each token's heaviest expert."""
    from carpool.hosts.transformers import find_layers

    values: list[Tensor] = []
    layers = find_layers(model)
    if stats is None or "sensitivity" not in stats.for_layer(layers[0].index):
        raise CarpoolError(f"layer_threshold needs the statistic 'sensitivity': run `{made_by('sensitivity')}`")
    weight_L = [stats.for_layer(layer.index)["sensitivity"].item() for layer in layers]

    def keep(place: int, batch: Batch, outcome: Outcome) -> None:
        heaviest_first_NK = outcome.routing.weights_NK.double().sort(dim=-1, descending=True).values
        share_NK = heaviest_first_NK / heaviest_first_NK.sum(-1, keepdim=True)
        values.append((weight_L[place] * share_NK[:, 1:]).flatten().cpu())

    _passes(model, parse(f"topk({layers[0].top_k})"), sequences_BT, stats, keep, progress)
    found_S = torch.cat(values).sort().values
    if not len(found_S):
        raise CarpoolError("the model has one expert per token: there is nothing to skip")
    places_Q = torch.linspace(0, len(found_S) - 1, STEPS, device="cpu").round().long()
    return sorted({0.0, *found_S[places_Q].tolist(), 2 * float(found_S[-1])})


def _passes(
    model: Any,
    plan: Plan,
    sequences_BT: Tensor,
    stats: Statistics | None,
    observe: Callable[[int, Batch, Outcome], None],
    progress: Callable[[int], None],
) -> None:
    from carpool.hosts.transformers import share

    device = next(model.parameters()).device
    rows = max(1, BATCH_TOKENS // sequences_BT.shape[1])
    options: dict[str, Any] = {"stats": stats if plan.required_stats() else None, "observe": observe}
    with torch.inference_mode(), share(model, plan, exempt_prefill=False, **options):
        for ids_BT in sequences_BT.split(rows):
            model.base_model(input_ids=ids_BT.to(device), use_cache=False)
            progress(ids_BT.numel())


def domain_of(stats: Statistics, named: str | None) -> str | None:
    """The domain of that name, or the one domain that begins so; None stays None.

    Raises:
        CarpoolError: no such domain, or several that begin so.
    """
    if named is None:
        return None
    tensors = stats.for_layer(min(stats.layers))
    known = [name.removeprefix("easy_ep/") for name in tensors if name.startswith("easy_ep/")]
    found = [named] if named in known else [name for name in known if name.startswith(named)]
    if len(found) != 1:
        raise CarpoolError(_no_scores(tensors, named))
    return found[0]


def fixed_lists(stats: Statistics, size: Any, domain: str | None) -> tuple[dict[int, list[int]], list[str]]:
    """By layer, the experts of `allow_list(size=..., domain=...)`, and those (`layer:expert`) on a list without any
    token of the domain: nothing says that they are of use.

    Raises:
        CarpoolError: a bad size, statistics without scores, or a domain that they do not know.
    """
    plan = parse(f"allow_list(size={size!r}, domain={domain!r})")
    plan.check(stats.num_experts, stats.top_k)
    (name,) = plan.policy.required_stats()
    coverage = "coverage" if domain is None else f"coverage/{domain}"
    lists: dict[int, list[int]] = {}
    unseen: list[str] = []
    for index in sorted(stats.layers):
        tensors = stats.for_layer(index)
        if name not in tensors:
            raise CarpoolError(_no_scores(tensors, domain))
        lists[index] = plan.policy.prepare(tensors)["allow"].nonzero().flatten().tolist()
        unseen += [f"{index}:{expert}" for expert in lists[index] if tensors[coverage][expert] == 0]
    return lists, unseen


def _no_scores(names: Sequence[str] | Mapping[str, Tensor], domain: str | None) -> str:
    known = sorted(name.removeprefix("easy_ep/") for name in names if name.startswith("easy_ep/"))
    if not known:
        return f"the statistics hold no EASY-EP scores: make them with `{made_by('easy_ep')}`"
    return f"the statistics have no domain {domain!r}; they know {', '.join(map(repr, known))}"
