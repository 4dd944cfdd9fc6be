"""An evaluation of block diffusion from settings to results: held-out text denoised, and prompts decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from carpool.diffusion import Decoding
from carpool.errors import CarpoolError
from carpool.evaluate.decoded import Decoded, metrics
from carpool.evaluate.denoising import BlockLayout, Denoised, denoise
from carpool.evaluate.generations import Generated, decode
from carpool.evaluate.loop import explaining_memory
from carpool.evaluate.metrics import Result, results
from carpool.evaluate.results import as_dict as result_as_dict
from carpool.evaluate.sequences import Sequences
from carpool.evaluate.study import describe
from carpool.plans.policy_file import AnyPlan
from carpool.routing.batch import Grouping

Advance = Callable[[int], None]


@dataclass(frozen=True)
class BlockSettings:
    """What to evaluate.

    Attributes:
        plans: policies, bare or with guards.
        grouping: `request` (a coreset for each sequence, as in DES) or `batch`.
        batch_sizes: sequences that decode together; every size uses the same sequences as far as it needs them.
        decoding: block, threshold, steps, mask token and `max_new`, the tokens denoised and decoded of each sequence.
        prompt: tokens before them.
        tokens: decoded tokens at every batch size, rounded to whole batches, two at least.
        batches: number of batches instead.
        seed: of the sequences and the masks.
        share_commits: the forwards that write finished blocks to the cache run under the policy, too.
        follow: decode once more under every plan, each block after stock's text.
        allow_unchanged: a plan may change no row.
    """

    plans: tuple[AnyPlan, ...]
    grouping: Grouping
    batch_sizes: tuple[int, ...]
    decoding: Decoding
    prompt: int = 32
    tokens: int = 2048
    batches: int | None = None
    seed: int = 0
    share_commits: bool = False
    follow: bool = True
    allow_unchanged: bool = False

    def __post_init__(self) -> None:
        if not self.plans:
            raise CarpoolError("no policy was given: name one or more, such as --policy 'des_vote(beta=0.3)'")
        for name in ("tokens", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CarpoolError(f"--{name} {value}: give 1 or more")
        self.layouts()

    def layouts(self) -> list[tuple[BlockLayout, int]]:
        """Layout and number of batches of every batch size."""
        new, block = self.decoding.max_new, self.decoding.block
        made = [BlockLayout.of(rows, self.prompt, new, block, self.grouping) for rows in self.batch_sizes]
        return [(layout, self.batches or max(2, round(self.tokens / (layout.batch_size * new)))) for layout in made]

    @property
    def num_sequences(self) -> int:
        return max(layout.batch_size * batches for layout, batches in self.layouts())

    @property
    def work(self) -> int:
        """Requests to decode and sequences to denoise over all plans, for a progress bar."""
        sequences = sum(layout.batch_size * batches for layout, batches in self.layouts())
        return sequences * 2 * (1 + len(self.plans))


@dataclass(frozen=True, eq=False)
class BlockResult:
    """One plan at one batch size: held-out text denoised (KL and losses count masked tokens), and prompts decoded."""

    denoised: Result
    decoded: Decoded
    sums: Denoised
    generated: Generated
    settings: BlockSettings

    @property
    def plan(self) -> AnyPlan | None:
        return self.generated.plan

    @property
    def name(self) -> str:
        return self.generated.name


def block_study(
    model: Any, settings: BlockSettings, sequences: Sequences, *, judge: Any = None, stats: Any = None,
    advance: Advance = lambda done: None,
) -> list[list[BlockResult]]:  # fmt: skip
    """Results by batch size, stock first in each.

    Raises:
        CarpoolError: plans that do not fit the model, did not run, or should act and changed no row; logits that are
            not finite; not enough memory or text.
    """
    moe = describe(model)
    for plan in settings.plans:
        plan.check(moe.experts, moe.top_k)
    found = []
    for layout, batches in settings.layouts():
        prompts = prompts_of(sequences, layout.batch_size * batches, settings.prompt)
        with explaining_memory(layout):
            sums = denoise(
                model, moe, settings.plans, sequences, layout, batches, settings.decoding.mask_token,
                seed=settings.seed, stats=stats, allow_unchanged=settings.allow_unchanged, advance=advance,
            )  # fmt: skip
            generated = decode(
                model, moe, settings.plans, prompts, settings.decoding, layout.batch_size, group=settings.grouping,
                stats=stats, share_commits=settings.share_commits, judge=judge, follow=settings.follow,
                advance=advance,
            )  # fmt: skip
        found.append(combined(sums, generated, settings))
    return found


def combined(sums: list[Denoised], generated: list[Generated], settings: BlockSettings) -> list[BlockResult]:
    """Both halves as metrics, stock first.

    Raises:
        CarpoolError: a plan that should act and changed no row.
    """
    one = results([each.measured for each in sums])
    other = metrics(generated)
    for each in generated:
        if each.plan is not None and not each.changed_rows and not settings.allow_unchanged:
            raise CarpoolError(
                f"{each.plan} changed no row at batch {each.batch} grouped by {settings.grouping}: it is an identity "
                "setting or did nothing; pass --allow-unchanged if that is what you want to measure"
            )
    return [BlockResult(*row, settings) for row in zip(one, other, sums, generated, strict=True)]


def prompts_of(sequences: Sequences, count: int, length: int) -> list[Tensor]:
    """The first tokens of the first sequences."""
    return [ids_T[:length].clone() for ids_T in sequences.ids_ST[:count]]


def as_dict(result: BlockResult) -> dict[str, Any]:
    """One row of the results: what a lockstep evaluation says of the masked tokens, and `decoding`."""
    row = result_as_dict(result.denoised)
    decoding = result.settings.decoding
    row["group"] = str(result.settings.grouping)
    row["masked_tokens"] = row.pop("decoded_tokens")
    row["by_masked_ratio"] = {
        str(ratio): {"tokens": int(tokens), "kl": kl / tokens, "nll": nll / tokens}
        for ratio, (tokens, kl, nll) in result.sums.by_ratio.items()
    }
    row["decoding"] = {
        "batch": result.generated.batch,
        "block_size": decoding.block,
        "threshold": decoding.threshold,
        "steps": decoding.steps,
        "requests": int(result.generated.sums["requests"].sum()),
        "tokens": int(result.generated.sums["tokens"].sum()),
        "changed_rows": result.generated.changed_rows,
        **asdict(result.decoded),
    }
    return row
