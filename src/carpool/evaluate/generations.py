"""Decodes prompts by block diffusion under policies, and sums what was read and how much of stock's text is kept.

Shapes: `M` batches, `B` requests, `L` MoE layers, `D` new tokens of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carpool.diffusion import Decoding, Generation, Session, generate
from carpool.errors import CarpoolError
from carpool.evaluate.intervals import Array
from carpool.evaluate.loop import MoE
from carpool.plans.pipeline import Outcome
from carpool.plans.policy_file import AnyPlan, stats_for
from carpool.routing.batch import Batch

QUARTERS = 4  # the union is also kept by the share of the block that is still masked
GRAM = 4  # tokens of the runs whose repetition is counted
FIELDS = (
    "union", "group_union", "groups", "natural_union", "pairs", "displaced", "expected_loss", "changed", "rows",
    "layer_forwards", "commit_union", "layer_commits", "forwards", "accepted", "request_forwards", "same", "before",
    "tokens", "equal", "requests", "judge_nll", "judged", "repeated", "grams", "followed_same", "followed",
)  # fmt: skip


class Reads:
    """Sums what every layer did in the denoising forwards, and what the forwards that write the cache read."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.sums = dict.fromkeys(FIELDS, 0.0)
        self.by_masked = np.zeros((QUARTERS + 1, 2))  # unions of groups and their number; the last row: all is masked
        self.masked = 1.0

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        phase = None if self.session is None else self.session.phase
        union = int(outcome.union_SE.sum())
        if phase == "commit":
            self.sums["commit_union"] += union
            self.sums["layer_commits"] += 1
        elif phase == "denoise":
            groups_GE = outcome.inputs.batch.group_any(outcome.computed_NE)
            found = {
                "union": union, "group_union": int(groups_GE.sum()), "groups": int(groups_GE.any(-1).sum()),
                "natural_union": int(outcome.natural_SE.sum()),
                "pairs": int((outcome.routing.weights_NK != 0).sum()),
                "displaced": float(outcome.displaced_N.double().sum()),
                "expected_loss": float(outcome.expected_loss_N.double().sum()),
                "changed": int(outcome.changed_N.sum()),
                "rows": len(outcome.changed_N), "layer_forwards": 1,
            }  # fmt: skip
            for name, value in found.items():
                self.sums[name] += value
            self.by_masked[min(int(self.masked * QUARTERS), QUARTERS)] += (found["group_union"], found["groups"])


@dataclass(frozen=True, eq=False)
class Generated:
    """Sums of one plan over batches of prompts.

    Attributes:
        plan: None is stock.
        sums: by field of `FIELDS`, one value a batch, `[M]`.
        by_masked: unions of groups and their number by the masked share of the rows' blocks: quarters, then all masked.
        generations: what was generated, a batch each.
    """

    plan: AnyPlan | None
    batch: int
    sums: dict[str, Array]
    by_masked: Array
    generations: list[Generation] = field(repr=False)

    @property
    def name(self) -> str:
        return "stock" if self.plan is None else str(self.plan)

    @property
    def changed_rows(self) -> int:
        return int(self.sums["changed"].sum())


def decode_plan(
    model: Any,
    plan: AnyPlan,
    prompts: Sequence[Tensor],
    decoding: Decoding,
    *,
    group: Any,
    stats: Any = None,
    share_commits: bool = False,
    watch: Callable[[Any], None] | None = None,
    **given: Any,
) -> tuple[Generation, Reads]:
    """Generate under a plan and sum what its layers read; `given` goes to `generate`."""
    from carpool.hosts.transformers import share

    reads = Reads()

    def seen(block: Any) -> None:
        active = block.active()
        if active:
            reads.masked = float(block.masked_AL[active].float().mean())
        if watch is not None:
            watch(block)

    with share(model, plan, group=group, stats=stats_for(plan, stats), observe=reads) as run:
        reads.session = session = Session(model, prompts, decoding.block, run=run, share_commits=share_commits)
        made = generate(session, prompts, decoding, watch=seen, **given)
    return made, reads


def decode(
    model: Any,
    moe: MoE,
    plans: Sequence[AnyPlan],
    prompts: Sequence[Tensor],
    decoding: Decoding,
    batch: int,
    *,
    group: Any,
    stats: Any = None,
    share_commits: bool = False,
    judge: Any = None,
    stock: Generated | None = None,
    follow: bool = False,
    given: Callable[[], dict[str, Any]] = dict,
    advance: Callable[[int], None] = lambda requests: None,
) -> list[Generated]:
    """Stock first, then every plan, over the prompts in batches of `batch`.

    Args:
        judge: an autoregressive model with the same tokens, whose perplexity of the generated text is measured.
        stock: measured before on the same prompts, taken as it is.
        follow: decode once more under every plan, each block after stock's text (`Generation.blocks`), so that one
            changed token does not change all that follows it.
        given: what `generate` is given under a plan, made anew for each generation (`step`, `voters`).
        advance: told the requests of every generation that is done.

    Raises:
        CarpoolError: what `share` and `generate` raise; prompts that do not fill whole batches.
    """
    if len(prompts) % batch or not len(prompts):
        raise CarpoolError(f"{len(prompts)} prompts do not fill batches of {batch}")
    parts = [list(prompts[first : first + batch]) for first in range(0, len(prompts), batch)]
    how: dict[str, Any] = {"group": group, "stats": stats, "share_commits": share_commits}
    found = [] if stock is None else [stock]
    for plan in ([None] if stock is None else []) + list(plans):
        rows, by_masked, made = [], np.zeros((QUARTERS + 1, 2)), []
        for index, part in enumerate(parts):
            more = {} if plan is None else given()
            generation, reads = decode_plan(model, plan or moe.stock, part, decoding, **how, **more)
            base = found[0].generations[index] if found else generation
            again = None
            if follow and plan is not None:
                again, _ = decode_plan(model, plan, part, decoding, **how, **given(), follow=base.blocks)
            _compare(reads.sums, generation, base, again)
            _judge(reads.sums, judge, part, generation)
            rows.append([reads.sums[name] for name in FIELDS])
            by_masked += reads.by_masked
            made.append(generation)
            advance(len(part))
        sums = dict(zip(FIELDS, np.array(rows).T, strict=True))
        found.append(Generated(plan, batch, sums, by_masked, made))
    return found


def _compare(sums: dict[str, float], made: Generation, stock: Generation, followed: Generation | None) -> None:
    """How much of stock's text a generation shares, request by request."""
    sums["forwards"] += len(made.forwards)
    sums["accepted"] += int(made.accepted_B.sum())
    sums["request_forwards"] += int(made.forwards_B.sum())
    same, total = agreement(made.tokens, stock.tokens)
    sums["same"] += same
    sums["tokens"] += total
    for mine, theirs in zip(made.tokens, stock.tokens, strict=True):
        same_D = (mine[: len(theirs)] == theirs[: len(mine)]).tolist()
        sums["before"] += [*same_D, False].index(False)
        sums["equal"] += len(mine) == len(theirs) and all(same_D)
        sums["requests"] += 1
        grams = [tuple(mine[i : i + GRAM].tolist()) for i in range(len(mine) - GRAM + 1)]
        sums["repeated"] += len(grams) - len(set(grams))
        sums["grams"] += len(grams)
    if followed is None:
        return
    same, total = agreement(followed.tokens, stock.tokens)
    sums["followed_same"] += same
    sums["followed"] += total


def agreement(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[int, int]:
    """Positions that hold the same token in two generations of the same requests, and all positions."""
    pairs = list(zip(mine, theirs, strict=True))
    same = sum(int((one[: len(other)] == other[: len(one)]).sum()) for one, other in pairs)
    return same, sum(max(len(one), len(other)) for one, other in pairs)


def _judge(sums: dict[str, float], judge: Any, prompts: Sequence[Tensor], made: Generation) -> None:
    """Negative log-likelihood of the generated tokens under an autoregressive model, after the prompt."""
    if judge is None:
        return
    for prompt, tokens in zip(prompts, made.tokens, strict=True):
        if not len(tokens) or not len(prompt):
            continue
        ids_T = torch.cat([prompt.to(tokens.device), tokens])
        with torch.inference_mode():
            logits_TV = judge(input_ids=ids_T[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
        nll = torch.nn.functional.cross_entropy(logits_TV.float(), tokens, reduction="sum")
        sums["judge_nll"] += float(nll)
        sums["judged"] += len(tokens)
