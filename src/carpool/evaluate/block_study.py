"""An evaluation of block diffusion from settings to results: held-out text denoised, and prompts decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from carpool.evaluate.sequences import FEWER, Cut, Document, Sequences, amount
from carpool.evaluate.study import describe
from carpool.plans.policy_file import AnyPlan
from carpool.routing.batch import Grouping

Advance = Callable[[int], None]
TOKENS = 2048  # decoded at every batch size unless told otherwise


@dataclass(frozen=True)
class BlockSettings:
    """What to evaluate.

    Attributes:
        plans: policies, bare or with guards.
        grouping: `request` (a coreset for each sequence, as in DES) or `batch`.
        batch_sizes: sequences that decode together; every size draws its own from the same texts.
        decoding: block, threshold, steps, mask token and `max_new`, the tokens denoised and decoded of each sequence.
        prompt: tokens before them.
        tokens: decoded tokens at every batch size, rounded to whole batches; ten for an interval if the texts hold
            them. None: `TOKENS`, or what the texts hold. No two batches share a document.
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
    tokens: int | None = None
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

    def layouts(self) -> list[BlockLayout]:
        """Of every batch size."""
        new, block = self.decoding.max_new, self.decoding.block
        return [BlockLayout.of(size, self.prompt, new, block, self.grouping) for size in self.batch_sizes]

    def amount(self, layout: BlockLayout) -> tuple[int, int]:
        """The fewest batches that will do and how many are wanted."""
        return amount(self.tokens, self.batches, TOKENS, layout.batch_size * layout.decoded)

    def work(self, sequences: Iterable[Sequences]) -> int:
        """Requests to decode and sequences to denoise over all plans, for a progress bar."""
        return sum(len(one.ids_ST) for one in sequences) * 2 * (1 + len(self.plans))


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
    model: Any, settings: BlockSettings, sequences: Sequence[Sequences], *, judge: Any = None, stats: Any = None,
    advance: Advance = lambda done: None,
) -> list[list[BlockResult]]:  # fmt: skip
    """Results by batch size, each over its own sequences, stock first.

    Raises:
        CarpoolError: plans that do not fit the model, did not run, or should act and changed no row; logits that are
            not finite; not enough memory or text.
    """
    moe = describe(model)
    for plan in settings.plans:
        plan.check(moe.experts, moe.top_k)
    found = []
    for layout, own in zip(settings.layouts(), sequences, strict=True):
        prompts = prompts_of(own, len(own.ids_ST), settings.prompt)
        with explaining_memory(layout):
            sums = denoise(
                model, moe, settings.plans, own, layout, own.batches, settings.decoding.mask_token,
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


def block_sequences(
    settings: BlockSettings,
    documents: Iterable[Document],
    tokenizer: Any,
    progress: Advance | None = None,
    *,
    fewer: str = FEWER,
) -> list[Sequences]:
    """The sequences of every batch size; raises CarpoolError where the texts do not hold them."""
    length = settings.prompt + settings.decoding.max_new
    cut = Cut.of(documents, tokenizer, length=length, seed=settings.seed, progress=progress)
    return [
        cut.draw_within(*settings.amount(layout), layout.batch_size, seed=settings.seed, fewer=fewer)
        for layout in settings.layouts()
    ]


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
