"""`carpool doctor`: what sharing experts could do for a model, before any weight is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.options import ShowJson
from carpool.cli.table import Column, Row, print_table, say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.doctor import Diagnosis
    from carpool.offloading.estimate import Estimate

ESTIMATE = "* an upper estimate: as if tokens drew experts independently and evenly; `carpool evaluate` measures"

GPU_DRIVERS = ("/proc/driver/nvidia/version", "/dev/kfd")  # asking torch takes seconds


@command("doctor")
def doctor(
    model: Annotated[str, typer.Argument(help="A model's folder, its config.json, or a name in the local cache.")],
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth in GB/s, for the time a step's reads take.")] = 0.0,
    memory: Annotated[
        str | None, typer.Option(help="Memory for weights, such as 8GiB: will it fit, and how fast can it be at most?")
    ] = None,
    disk: Annotated[str, typer.Option(help="What the disk reads, for --memory.")] = "2GB/s",
    policy: Annotated[str | None, typer.Option(help="A policy text: how would vLLM run it on this model?")] = None,
    as_json: ShowJson = False,
) -> None:
    """Read a model's configuration: routing rule, experts read at each batch size, what a policy needs."""
    from carpool.doctor import BATCHES, diagnose

    if not 0 <= bandwidth < float("inf"):
        raise CarpoolError(f"--bandwidth {bandwidth}: give GB/s, 0 for none")
    console = Console()
    found = diagnose(model)
    paths = {} if policy is None else found.paths(policy)
    fits = None if memory is None else _estimates(model, memory, disk)
    if as_json:
        fit = {} if fits is None else {"fit": [asdict(one) for one in fits]}
        typer.echo(json.dumps(_as_dict(found, bandwidth) | ({"paths": paths} if paths else {}) | fit, indent=1))
        return
    rule = found.rule
    console.print(
        f"[bold]{found.architecture}[/] ({found.family}): {found.moe_layers} of {found.layers} layers are MoE"
    )
    console.print(
        f"{found.num_experts} experts, {found.top_k} per token, "
        f"{found.expert_bytes / 1e6:.2f} MB an expert at {found.weights}"
    )
    limits = f", {rule.kept_groups} of {rule.num_groups} expert groups" if rule.num_groups > 1 else ""
    bias = ", correction bias on the choice" if rule.bias else ""
    renormalized = "renormalised" if rule.renormalize else "not renormalised"
    console.print(f"routing: {rule.scoring}, weights {renormalized}, scaling {rule.scaling:g}{bias}{limits}\n")

    columns = [Column("batch"), Column("experts read per layer*"), Column("% of all", rank=2), Column("GB per step")]
    columns += [Column("ms per step")] if bandwidth > 0 else []
    rows = []
    for batch in BATCHES:
        union = found.expected_union(batch)
        size = found.step_bytes(union) / 1e9
        row = [str(batch), f"{union:.1f}", f"{100 * union / found.num_experts:.0f}", f"{size:.3g}"]
        rows.append(Row([*row, *([f"{1e3 * size / bandwidth:.3g}"] if bandwidth > 0 else [])]))
    print_table(console, columns, rows)
    say(console, f"{ESTIMATE}\n")

    if fits is not None:
        _print_fit(console, fits, f"{memory} of memory, a disk of {disk}")
    console.print("[bold]Policies to begin with[/]")
    suggestions = found.suggestions()
    wide = max(len(text) for text, _ in suggestions)
    for text, needs in suggestions:
        say(console, f"  {text:{wide}}   needs: {needs}")
    say(console, "  `carpool tune` finds the numbers for a quality that you name")
    here = "cuda" if any(map(os.path.exists, GPU_DRIVERS)) else "cpu"
    console.print("\n[bold]In vLLM[/], where a policy needs routing in Python")
    places = {"cpu": "CPU build", "cuda": "GPUs"}
    places[here] += " (this machine)"
    for device, place in places.items():
        say(console, f"  {place}: {found.in_vllm[device]}")
    console.print("\n[bold]In SGLang[/]")
    say(console, f"  {found.in_sglang}")
    if paths:
        console.print(f"\n[bold]A layer's routing in vLLM[/] under {policy}", highlight=False)
        for device, place in places.items():
            say(console, f"  {place}: {paths[device]}")


def _estimates(model: str, memory: str, disk: str) -> list[Estimate]:
    from carpool.fit import estimates
    from carpool.offloading.amounts import bytes_of

    return estimates(model, bytes_of(memory, "--memory"), bytes_of(disk, "--disk", speed=True))


def _print_fit(console: Console, fits: list[Estimate], where: str) -> None:
    """What fits, and what the disk allows one sequence where not all does."""
    from carpool.fit import HIT_RATES

    console.print(f"[bold]Will it fit?[/] {where}; {fits[0].rest / 1e9:.2f} GB are no experts", highlight=False)
    columns = [Column("bits"), Column("GB of experts"), Column("resident, %", "share of the experts beside the rest")]
    columns += [Column("GB a token", "of experts that one token reads", rank=1)]
    columns += [Column(f"{100 * rate:.0f} % hits", "tokens a second at most", rank=2) for rate in HIT_RATES]
    rows = []
    for one in fits:
        row = [f"{one.bits:g}", f"{one.all_experts / 1e9:.1f}", f"{100 * max(0.0, one.resident):.0f}"]
        most = ["fits" if one.fits else f"{one.most(rate):.1f}" if one.runs else "no" for rate in HIT_RATES]
        rows.append(Row([*row, f"{one.token / 1e9:.3f}", *most]))
    print_table(console, columns, rows)
    say(
        console,
        "tokens a second that the disk allows one sequence; a cache hits as often as it holds experts where routing "
        "has no locality, and more often where it has: `carpool trace show`\n",
    )


def _as_dict(found: Diagnosis, bandwidth: float) -> dict[str, Any]:
    """The same as JSON: sizes in bytes, times in milliseconds where a bandwidth is given."""
    from carpool.doctor import BATCHES

    steps = []
    for batch in BATCHES:
        union = found.expected_union(batch)
        size = found.step_bytes(union)
        times = {"ms_per_step": size / bandwidth / 1e6} if bandwidth > 0 else {}
        steps.append({"batch": batch, "expected_union": union, "bytes_per_step": size, **times})
    return {
        "architecture": found.architecture, "family": found.family, "layers": found.layers,
        "moe_layers": found.moe_layers, "num_experts": found.num_experts, "top_k": found.top_k,
        "expert_bytes": found.expert_bytes, "weights": found.weights,
        "routing": asdict(found.rule),
        "steps": steps,
        "suggestions": [{"policy": text, "needs": needs} for text, needs in found.suggestions()],
        "vllm": found.in_vllm, "sglang": found.in_sglang,
    }  # fmt: skip
