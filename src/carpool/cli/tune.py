"""`carpool tune`: a policy file that keeps a quality target and reads as little as it can."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from carpool.artefacts.files import atomic_path
from carpool.cli.app import command
from carpool.cli.common import embedded_texts, model_facts, open_model, progress, shipped_statistics
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.calibrate.sequences import Windows
    from carpool.evaluate.loop import MoE
    from carpool.tune import Family, Target, Tuned

RANK = 16  # of the surrogates, where statistics are made on the way
CALIBRATION = 20_000  # tokens for them


@command("tune")
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name of a transformers model; default: the reference model.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help=".txt or .jsonl like what you serve; may be repeated; default: embedded texts."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file to write.")] = Path("policy.json"),
    max_kl: Annotated[float | None, typer.Option(help="Target: KL(stock || policy), nats a decoded token.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Target: perplexity over stock's.")] = None,
    share: Annotated[
        float | None, typer.Option("--bytes", help="Target instead: share of the bytes that stock reads, least KL.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Name, or a plan whose number is tuned; may be repeated.")
    ] = None,
    group: Annotated[str, typer.Option(help="Rows that share a coreset: batch, request or block:n.")] = "batch",
    batch: Annotated[int, typer.Option(help="Sequences that decode together where you serve.")] = 16,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence, prompt included.")] = 128,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt, which keeps its native routing.")] = 32,
    tokens: Annotated[int, typer.Option(help="Decoded tokens of the search, and as many to verify.")] = 9_216,
    seed: Annotated[int, typer.Option(help="Seed of the sequences and the intervals.")] = 0,
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of `carpool calibrate`; made on the way where policies need some.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help="Passed on to transformers, such as auto.")] = None,
) -> None:
    """Find the policy that reads least within a quality target, verify it on unseen text, write a policy file."""
    from carpool.artefacts.files import require_writable, sha256_file
    from carpool.artefacts.statistics import Statistics
    from carpool.artefacts.texts import load_texts
    from carpool.calibrate import token_sequences
    from carpool.evaluate.study import Settings, describe_layers, sequences_for
    from carpool.hosts.transformers import find_layers, identity
    from carpool.plans.policy_file import PolicyFile
    from carpool.routing.batch import Grouping
    from carpool.tune import DEFAULT, Target, Trials, family, measurable
    from carpool.tune import tune as search_for
    from carpool.tune.split import split

    console = Console(soft_wrap=True, highlight=False)
    target = Target(max_kl, max_perplexity_ratio, share)
    families = [family(one) for one in policy or DEFAULT]
    settings = Settings(
        tuple(one.plan for one in families), Grouping.parse(group), (batch,),
        sequence=sequence, prefill=prefill, tokens=tokens, seed=seed,
    )  # fmt: skip
    require_writable(output)
    paths = text or embedded_texts()
    halves = split(load_texts(paths))
    if halves.dropped:
        console.print(f"{halves.dropped} documents say what others say and are left out")
    data = [(path.name, sha256_file(path)) for path in paths]
    opened = open_model(model)
    moe = describe_layers(opened.layers)
    families = [one for one in families if one.values(moe.experts, moe.top_k)]
    fewer = "lower --sequence, --tokens or --batch"
    both = (halves.search, halves.verify)
    with progress("tokenizing", sum(len(document.text) for half in both for document in half)) as advance:
        parts = [sequences_for(settings, half, opened.tokenizer, advance, fewer=fewer)[0] for half in both]
    source = stats or (shipped_statistics() if model is None else None)
    windows = None
    if source is None and any(one.required_stats for one in families):
        windows = token_sequences(halves.search, opened.tokenizer, CALIBRATION, 256, seed, True)
    loaded = opened.weights(device_map=device_map)
    if windows is not None:
        source = _calibrate(loaded, windows, output, seed, data)
    statistics = None if source is None else Statistics.load(source)
    if statistics is not None and not policy:
        families = measurable(families, statistics.for_layer(opened.layers[0].index))
    facts = model_facts(loaded, model)
    (layout,) = settings.layouts()
    memory = output.with_name(f".{output.name}.progress")
    depends = {
        "model": identity(find_layers(loaded)).name, "texts": data, "group": group, "batch": batch,
        "sequence": sequence, "prefill": prefill, "tokens": tokens, "seed": seed,
        "statistics": None if source is None else sha256_file(source),
    }  # fmt: skip
    with progress("tuning", _expected(families, moe), "trials") as bar:
        search, verify = (
            Trials(
                loaded, moe, part, layout, part.batches,
                stats=statistics, seed=seed, memory=kept, settings=depends, advance=lambda policy: bar(1),
            )
            for part, kept in zip(parts, (memory, None), strict=True)
        )  # fmt: skip
        if search.points:
            bar.say(f"resuming after {len(search.points)} trials")
        found = search_for(families, target, search, verify, bar.say)
    PolicyFile(
        found.plan,
        {},
        {"fingerprint": facts["fingerprint"], "num_layers": moe.layers, "num_experts": moe.experts, "top_k": moe.top_k},
        _beside(output, source) if found.plan.policy.required_stats() else None,
        (
            {
                "target": target.given, "batch": batch, "group": group, "sequence": sequence, "prefill": prefill,
                "tokens": tokens, "seed": seed, "texts": data,
            },
            *({"text": "search", **asdict(point)} for point in search.points.values()),
            *({"text": "unseen", **asdict(point)} for point in verify.points.values()),
        ),
    ).save(output)  # fmt: skip
    memory.unlink(missing_ok=True)
    _show(console, found, target, output, batch)
    if not found.met:
        raise typer.Exit(1)


def _calibrate(model: Any, windows: Windows, output: Path, seed: int, data: list[tuple[str, str]]) -> Path:
    """Statistics beside the policy file; those of an interrupted run are taken up."""
    from carpool.artefacts.statistics import Statistics
    from carpool.calibrate import calibrate
    from carpool.calibrate.surrogate_fit import SurrogateFit
    from carpool.hosts.transformers import find_layers, identity

    path = output.with_suffix(".safetensors")
    if path.exists():
        old = Statistics.load(path)
        with suppress(CarpoolError):
            old.check(identity(find_layers(model)))
            if (old.seed, list(old.data)) == (seed, data):
                return path
        raise CarpoolError(f"{path} holds other statistics; name it with --stats, move it, or choose another --output")
    with progress("calibrating", windows.ids_BT.numel(), "tokens") as advance:
        made = calibrate(
            model, find_layers(model), windows.ids_BT, domains=windows.domains, held_B=windows.held_B, data=data,
            seed=seed, energy=True, collectors=[lambda layer: SurrogateFit(layer, RANK)], progress=advance,
        )  # fmt: skip
    made.save(path)
    return path


def _beside(output: Path, source: Path | None) -> Path | None:
    """The statistics in the folder of the policy file, copied there if need be."""
    if source is None or source.resolve().parent == output.resolve().parent:
        return source
    path = output.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    return path


def _expected(families: Sequence[Family], moe: MoE) -> int:
    """Trials of a search, about: a bisection a family, and some to verify."""
    # a family that cannot beat an earlier one is soon left
    bisections = sum(
        ceil(log2(len(one.values(moe.experts, moe.top_k)) + 1)) if place == 0 else 2
        for place, one in enumerate(families)
    )
    return bisections + 2  # one verification or two


def _show(console: Console, found: Tuned, target: Target, output: Path, batch: int) -> None:
    from rich.markup import escape

    seen = found.verified
    console.print(f"[bold]{escape(str(found.plan))}[/], for batch {batch}:")
    console.print(
        f"on text that the search did not see it reads {seen.share:.1%} of what stock reads, at KL {seen.kl:.4f} "
        f"({seen.kl_low:.4f} to {seen.kl_high:.4f}) nats a token and perplexity x {seen.perplexity_ratio:.4f}"
    )
    if not found.met:
        console.print(f"[yellow]warning:[/] that misses the target ({target}); more --tokens make the search surer")
    console.print(f"wrote {output}", markup=False)
