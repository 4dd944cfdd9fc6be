"""`carpool allow-list` and `carpool threshold`: policy files made from statistics."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.calibrate import require_windows
from carpool.cli.common import (
    embedded_texts,
    listed,
    named_statistics,
    open_model,
    progress,
    require_model,
    require_number,
    warn,
)
from carpool.cli.options import Model, PolicyFileToWrite, Seed, Texts, WindowLength
from carpool.errors import CarpoolError


@command("allow-list")
def allow_list(
    stats: Annotated[Path, typer.Argument(help="Statistics of `carpool calibrate --energy`.")],
    size: Annotated[str, typer.Option(help="Experts of a list: a number of them (32) or a share (0.5).")] = "0.5",
    domain: Annotated[str | None, typer.Option(help="Domain to make the list for; default: all, equally.")] = None,
    fill: Annotated[str, typer.Option(help="backfill (next best listed expert) or drop.")] = "backfill",
    output: PolicyFileToWrite = Path("policy.json"),
) -> None:
    """Write a policy file with the experts that a domain needs, a list for each layer (EASY-EP)."""
    from carpool.artefacts.files import require_writable
    from carpool.artefacts.statistics import Statistics
    from carpool.calibrate.skipping import domain_of, fixed_lists
    from carpool.plans.policy_file import Plan, PolicyFile
    from carpool.policies import AllowList

    console = Console()
    number = _number(size)
    require_writable(output, ".json")
    given = Statistics.load(stats)
    domain = domain_of(given, domain)
    lists, unseen = fixed_lists(given, number, domain)
    first = next(iter(lists.values()))
    fixed: Any = AllowList(experts=tuple(first), fill=fill)  # type: ignore[arg-type]  # checked there
    layers = {index: {"experts": experts} for index, experts in lists.items()}
    PolicyFile(Plan(fixed), layers=layers, model=_model(given)).save(output)
    if unseen:
        warn(
            console,
            f"on the list without any token that reached them (layer:expert): {listed(unseen)}; calibrate on more "
            "text, or make the list shorter",
        )
    said = f"{len(first)} of {given.num_experts} experts in {len(lists)} layers for {domain or 'all domains'}"
    console.print(f"{said}; wrote {output}", highlight=False, markup=False, soft_wrap=True)


@command("threshold")
def threshold(
    model: Model = None,
    skip: Annotated[float, typer.Option(help="Share of (token, expert) pairs to skip, 0 to 1.")] = 0.3,
    text: Texts = None,
    policy: Annotated[str, typer.Option(help="layer_threshold, tail_mass or top_p.")] = "layer_threshold",
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of `carpool calibrate --sensitivity`, for layer_threshold.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each pass over the text.")] = 4096,
    sequence: WindowLength = 256,
    seed: Seed = 0,
    output: PolicyFileToWrite = Path("policy.json"),
) -> None:
    """Find the threshold that skips a share of the experts' work (MoDES, NAEE, top-p); write a policy file."""
    require_model(model)
    from carpool.artefacts.files import require_writable
    from carpool.artefacts.statistics import made_by
    from carpool.artefacts.texts import load_texts
    from carpool.calibrate import token_sequences
    from carpool.calibrate.skipping import STEPS, find_threshold
    from carpool.hosts.transformers import fingerprint
    from carpool.plans.policy_file import PolicyFile

    console = Console()
    require_number("--skip", skip, 0, 1)
    require_windows(tokens, sequence, seed)
    require_writable(output, ".json")
    if policy != "layer_threshold" and stats is not None:
        raise CarpoolError(f"{policy} needs no statistics; leave out --stats")
    if policy == "layer_threshold":
        if stats is None:
            raise CarpoolError(f"layer_threshold needs --stats FILE, made with `{made_by('sensitivity')}`")
        if stats.resolve().parent != output.resolve().parent:
            raise CarpoolError(f"{stats} is not beside {output}: a policy file and its statistics lie in one folder")
    documents = load_texts(text or embedded_texts())
    opened = open_model(model)
    given = named_statistics([], stats, opened)
    windows = token_sequences(documents, opened.tokenizer, tokens, sequence, seed)
    loaded = opened.weights()
    with progress("searching", windows.ids_BT.numel() * (STEPS.bit_length() + 2)) as advance:
        found = find_threshold(loaded, policy, skip, windows.ids_BT, stats=given, progress=advance)
    PolicyFile(
        found.plan,
        model={
            "fingerprint": fingerprint(loaded), "num_layers": len(opened.layers),
            "num_experts": opened.layers[0].num_experts, "top_k": opened.layers[0].top_k,
        },
        statistics=stats,
        curve=tuple({"threshold": value, "skipped": share} for value, share in found.tried),
    ).save(output)  # fmt: skip
    console.print(
        f"{found.plan} skips {found.skipped:.1%} of the pairs over {windows.ids_BT.numel():,} tokens "
        f"(asked for {skip:.1%}); wrote {output}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _number(text: str) -> int | float:
    """Raises CarpoolError unless it is a whole number of experts, or a share in (0, 1]."""
    with suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise CarpoolError(f"--size {text!r}: give a number of experts (32) or a share of them (0.5)")


def _model(stats: Any) -> dict[str, Any]:
    return {
        "fingerprint": stats.fingerprint, "num_layers": len(stats.layers),
        "num_experts": stats.num_experts, "top_k": stats.top_k,
    }  # fmt: skip
