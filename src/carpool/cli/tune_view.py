"""What `carpool tune` says at its end: what was chosen and why nothing cheaper, which files there are, how to serve."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from carpool.cli.common import warn
from carpool.cli.tune_options import Options

if TYPE_CHECKING:
    from carpool.tune import AtBatch, Failed, Target, Tuned

SERVED = ("batch", "request", "prompt", "tenant")  # groupings that vLLM has, too


@dataclass(frozen=True)
class Files:
    """What a run wrote.

    Attributes:
        policy: the policy file. statistics: of the plan, beside it; None where the plan needs none.
        spare: statistics that were made on the way for plans that were not chosen.
    """

    policy: Path
    statistics: Path | None = None
    spare: Path | None = None

    @property
    def lines(self) -> list[str]:
        said = [f"wrote {self.policy}"]
        if self.statistics is not None:
            said.append(f"its statistics are {self.statistics}: keep both files in one folder")
        if self.spare is not None:
            said.append(f"wrote {self.spare} (statistics made for the search; the chosen policy needs none)")
        return said


def show(
    console: Console,
    options: Options,
    target: Target,
    found: Tuned,
    batches: int,
    files: Files,
    others: Sequence[AtBatch],
) -> None:
    """Everything, in the order in which a reader asks."""
    seen = found.verified
    console.print(f"[bold]{escape(str(found.plan))}[/], for batch {options.batch}:")
    console.print(
        f"on text that the search did not see it reads {seen.share:.1%} of what stock reads, at KL {seen.kl:.4f} "
        f"({seen.kl_low:.4f} to {seen.kl_high:.4f}, {batches} batches) nats a token and perplexity x "
        f"{seen.perplexity_ratio:.4f}"
    )
    if found.met and target.max_kl is not None and seen.kl_high > target.max_kl:
        console.print("its interval reaches beyond the target: more --tokens would tell")
    if not found.met:
        warn(console, f"that misses the target ({target}); more --tokens make the search surer")
    for said in why_not(found, target):
        console.print(said, markup=False)
    for said in elsewhere(others, options.batch):
        console.print(said, markup=False)
    for said in files.lines:
        console.print(said, markup=False)
    if found.plan.reads_depths:
        console.print(f"use it: carpool.share(model, {str(files.policy)!r})", markup=False)
        console.print(
            "serve it: on a checkpoint in planes (`carpool compress MODEL -o DIR`, of the model in 16 bits), as "
            "docs/serve.md says",
            markup=False,
        )
    else:
        console.print(f"serve it: {serve(options, files.policy)}", markup=False)


def elsewhere(others: Sequence[AtBatch], batch: int) -> list[str]:
    """What the plan does at every other batch size, and what it adds to quantised experts at each."""
    said = []
    for one in others:
        if one.point is None:
            said.append(f"at batch {one.batch}: not measured: {one.why}")
            continue
        seen = one.point
        missed = "" if one.met else ", which misses the target"
        if one.batch != batch:
            said.append(
                f"at batch {one.batch}: reads {seen.share:.1%}, KL {seen.kl:.4f} ({seen.kl_low:.4f} to "
                f"{seen.kl_high:.4f}){missed}"
            )
        if one.uniform is not None:
            less = 1 - seen.share / one.uniform
            what = f"{less:.0%} less" if less >= 0 else f"{-less:.0%} more"
            said.append(
                f"at batch {one.batch}: experts that all have the same bits, of the same file, need {one.uniform:.1%} "
                f"for that KL: this plan reads {what} than quantisation alone"
            )
    if all(one.uniform is None for one in others):
        said.append(
            "how it compares with quantised experts is not known: that takes experts in planes (carpool compress), and "
            "a KL that uniform bits reach"
        )
    return said


def why_not(found: Tuned, target: Target) -> list[str]:
    """A sentence for every plan that kept the target where it was searched for, and did not where it was verified."""
    return [f"{one.searched.policy} {_failed(one, target)}" for one in found.failed]


def _failed(one: Failed, target: Target) -> str:
    seen = one.verified
    measured = {
        "max_kl": f"KL {seen.kl:.4f}", "max_perplexity_ratio": f"perplexity x {seen.perplexity_ratio:.4f}",
        "bytes": f"reads {seen.share:.1%}",
    }  # fmt: skip
    ((name, limit),) = target.given.items()
    bound = f"{limit:.1%}" if name == "bytes" else f"{limit:g}"
    return f"({one.searched.share:.1%} on the searched text) failed verification: {measured[name]} > {bound}"


def serve(options: Options, policy: Path) -> str:
    """The command that serves the file, as it can be pasted; what to do instead for a grouping that vLLM lacks."""
    if options.group not in SERVED:
        call = f"carpool.share(model, {str(policy)!r}, group={options.group!r})"
        return f"in transformers, {call}: vLLM has no such grouping"
    config = json.dumps({"carpool": {"file": str(policy), "isolation": options.group}})
    return f"vllm serve {shlex.quote(_model(options))} --additional-config {shlex.quote(config)}"


def as_dict(options: Options, target: Target, found: Tuned, files: Files, others: Sequence[AtBatch]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "policy": str(found.plan), "met": found.met, "target": target.given,
        "searched": asdict(found.searched), "verified": asdict(found.verified),
        "batches": [asdict(one) for one in others],
        "failed": [{**asdict(one), "why": _failed(one, target)} for one in found.failed],
        "files": {name: None if path is None else str(path) for name, path in asdict(files).items()},
        "serve": serve(options, files.policy) if options.group in SERVED else None,
    }  # fmt: skip


def again(options: Options, trials: int, memory: Path) -> Sequence[str]:
    """How an interrupted run goes on."""
    if not trials or not memory.exists():
        return ["interrupted before anything was measured"]
    return [
        f"interrupted after {trials} trials, which are kept in {memory}: the same command goes on from there",
        f"(to begin anew, delete {memory})",
    ]


def _model(options: Options) -> str:
    from carpool.artefacts.model_source import source_of

    return options.model if options.model is not None else source_of(None)[0]
