"""`carpool doctor`: what sharing experts could do for a model, before any weight is loaded."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from carpool.cli.app import command
from carpool.errors import CarpoolError


@command("doctor")
def doctor(
    model: Annotated[str, typer.Argument(help="A model's folder, its config.json, or a name in the local cache.")],
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth in GB/s, for the time a step's reads take.")] = 0.0,
) -> None:
    """Read a model's configuration: routing rule, experts read at each batch size, what a policy needs."""
    from carpool.doctor import BATCHES, diagnose

    if not 0 <= bandwidth < float("inf"):
        raise CarpoolError(f"--bandwidth {bandwidth}: give GB/s, 0 for none")
    console = Console()
    found = diagnose(model)
    spec = found.spec
    console.print(
        f"[bold]{found.architecture}[/] ({found.family}): {found.moe_layers} of {found.layers} layers are MoE"
    )
    console.print(
        f"{found.num_experts} experts, {found.top_k} per token, "
        f"{found.expert_bytes / 1e6:.2f} MB an expert at {found.weights}"
    )
    limits = f", {spec.kept_groups} of {spec.num_groups} expert groups" if spec.num_groups > 1 else ""
    bias = ", correction bias on the choice" if spec.bias_E is not None else ""
    renormalized = "renormalised" if spec.renormalize or spec.scoring == "softmax_after_topk" else "not renormalised"
    console.print(f"routing: {spec.scoring}, weights {renormalized}, scaling {spec.scaling:g}{bias}{limits}\n")

    table = Table("batch", "experts read per layer*", "% of all", "GB per step", box=None, header_style="bold")
    if bandwidth > 0:
        table.add_column("ms per step")
    for batch in BATCHES:
        union = found.expected_union(batch)
        size = found.step_bytes(union) / 1e9
        row = [str(batch), f"{union:.1f}", f"{100 * union / found.num_experts:.0f}", f"{size:.3g}"]
        table.add_row(*row, *([f"{1e3 * size / bandwidth:.3g}"] if bandwidth > 0 else []))
    console.print(table)
    console.print(
        "* an upper estimate: as if tokens drew experts independently and evenly; `carpool evaluate` measures\n"
    )

    console.print("[bold]Policies to begin with[/]")
    for text, needs in found.suggestions():
        console.print(f"  {text}   needs: {needs}", highlight=False)
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    console.print("\n[bold]In vLLM[/], where a policy needs routing in Python")
    for device, name in (("cpu", "CPU build"), ("cuda", "GPUs")):
        place = f"{name} (this machine)" if device == here else name
        console.print(f"  {place}: {found.in_vllm[device]}", highlight=False)
