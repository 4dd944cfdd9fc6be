"""`carpool place`: where experts should live on several devices, from a trace; and placements for engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import open_model, progress, require_model, require_number, warn
from carpool.cli.options import Seed
from carpool.cli.table import DETAIL, Column, Row, print_table, say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.artefacts.trace import Trace
    from carpool.placement.compare import Row as Compared
    from carpool.placement.placement import Placement

FORMATS = {"carpool": ".json", "sglang": ".json", "ktransformers": ".pt", "checkpoint": ""}
COLUMNS = [
    Column("planner", kind="word"),
    Column("peak tokens", "(token, expert) pairs of the busiest device over the mean of all; 1 is even"),
    Column("peak experts", "that the busiest device reads in a layer and step"),
    Column("devices/token", "that compute something for a token, of a layer", rank=1),
    Column("KB/token", "that leave a token's device in a layer under this dispatch, both ways, in 16 bits", rank=1),
    Column("hops", "share of tokens whose best expert is on another device than in the layer before", rank=2),
    Column("moved", "experts' weights that devices get if experts lay in order before", rank=3),
    Column("stale", "peak experts on the next window over those on the window that was planned on", rank=DETAIL),
    Column("µs", "of a layer, predicted by the cost model that was entered"),
]


@dataclass(frozen=True)
class Options:
    """What `carpool place` takes."""

    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of the traced model; default: the trace alone."),
    ] = None
    trace: Annotated[Path, typer.Option(help="Trace of `carpool trace`.")] = Path("trace.safetensors")
    devices: Annotated[int, typer.Option(help="Devices that share the experts.")] = 8
    nodes: Annotated[int, typer.Option(help="Nodes that the devices are on.")] = 1
    dispatch: Annotated[str, typer.Option(help="How tokens get there: allgather, deepep, alltoall, coherent.")] = (
        "deepep"
    )
    phase: Annotated[str, typer.Option(help="Of the trace: decode or prefill.")] = "decode"
    redundant: Annotated[int, typer.Option(help="Replicas beyond one of each expert; 0: one more slot a device.")] = 0
    groups: Annotated[int, typer.Option(help="Expert groups of the model, which EPLB keeps on a node.")] = 1
    share: Annotated[
        list[str] | None, typer.Option(help="Also what this policy does to the busiest device; may be repeated.")
    ] = None
    cost: Annotated[
        str | None, typer.Option(help="a,b,c,d[,link]: max(a + b experts, c + d pairs) µs, bytes/µs of a link.")
    ] = None
    planner: Annotated[str | None, typer.Option(help="Whose placement to write with --output.")] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Placement to write, from the whole trace.")] = (
        None
    )
    format: Annotated[
        str,
        typer.Option(help="Of the placement: carpool or sglang (JSON), ktransformers (.pt), checkpoint (a folder)."),
    ] = "carpool"
    seed: Seed = 0


@command("place")
def place(options: Options) -> None:
    """Compare placements of experts on devices by replaying a trace, and write one for an engine.

    Planned on the first half of the trace, scored on the second. Without MODEL the trace is taken at its word.
    """
    if options.model is not None:
        require_model(options.model)
    from carpool.artefacts.trace import Trace
    from carpool.placement.compare import advise, compare
    from carpool.placement.cost import CostModel
    from carpool.placement.planners import PLANNERS, Sizes, planner, possible

    console = Console()
    _require(options)
    if options.output is not None:
        _require_output(options)
        chosen = planner(options.planner or "eplb")
    cost = None if options.cost is None else CostModel.parse(options.cost)
    trace = Trace.load(options.trace)
    if options.model is not None:
        _check(trace, options.model)
    sizes = Sizes(options.devices, options.nodes, options.redundant, options.groups, options.seed)
    part = trace.of_phase(options.phase)
    planners = possible(part.num_experts, sizes)
    if options.output is not None and chosen not in planners:
        raise CarpoolError(
            f"--planner {chosen.name} places every expert once, and {part.num_experts} do not divide among "
            f"{options.devices} devices: use one of {', '.join(one.name for one in planners)}"
        )
    with progress("planning", len(planners), "planners") as advance:
        rows = compare(part, sizes, options.dispatch, cost=cost, progress=advance)
    _show(console, rows, options, part)
    if len(planners) < len(PLANNERS):
        say(
            console,
            f"planners without replicas are left out: {part.num_experts} experts do not divide among {options.devices} "
            "devices",
        )
    elif options.phase == "prefill":
        _moving(console, part, options.devices)
    advice = advise(rows, options.dispatch)
    for said in (*advice.use, *advice.refused):
        say(console, said)
    for policy in options.share or []:
        _share(console, rows, part, policy)
    if options.output is not None:
        _write(console, options, trace, chosen.make(part, sizes))


def _require(options: Options) -> None:
    from carpool.artefacts.trace_checks import PHASES
    from carpool.placement.dispatch import way

    require_number("--devices", options.devices, 1, 1 << 16)
    require_number("--nodes", options.nodes, 1, 1 << 16)
    require_number("--seed", options.seed, 0, 2**63 - 1)
    way(options.dispatch)
    if options.phase not in PHASES:
        raise CarpoolError(f"--phase {options.phase}: use {' or '.join(PHASES)}")
    if options.format not in FORMATS:
        raise CarpoolError(f"--format {options.format}: use one of {', '.join(FORMATS)}")
    if options.output is None and (options.planner is not None or options.format != "carpool"):
        raise CarpoolError("--planner and --format say what to write: name a file, -o placement.json")


def _require_output(options: Options) -> None:
    """Before long work: something can be written there."""
    from carpool.artefacts.checkpoint import require_new_folder
    from carpool.artefacts.files import require_writable

    assert options.output is not None
    if options.format != "checkpoint":
        require_writable(options.output, FORMATS[options.format])
        return
    require_new_folder(options.output)
    if options.model is None:
        raise CarpoolError("--format checkpoint: name the MODEL whose experts are put in the order of the placement")


def _check(trace: Trace, model: str) -> None:
    from carpool.hosts.transformers import find_layers, identity

    trace.check(identity(find_layers(open_model(model).weights("auto"))))  # as stored: nothing is computed


def _show(console: Console, rows: list[Compared], options: Options, trace: Trace) -> None:
    timed = options.cost is not None
    hidden = trace.facts.hidden_size
    table = []
    for row in rows:
        one, own = row.later, row.own
        table.append(Row([
            row.planner.name, f"{one.peak_tokens:.2f}", f"{one.peak_activated:.2f}", f"{one.fan_out:.2f}",
            f"{one.bytes_sent(options.dispatch, hidden) / 1e3:.2f}" if hidden else "?",
            f"{one.hops:.0%}" if one.hops == one.hops else "-", str(row.moved),
            f"{one.peak_activated / own.peak_activated:.2f}", *([f"{row.micros:.2f}"] if timed else []),
        ], style="dim" if row.unusable else ""))  # fmt: skip
    steps = len(list(trace.steps()))
    title = (
        f"{trace.num_experts} experts, {trace.top_k} a token, {trace.num_layers} layers on {options.devices} devices, "
        f"{options.nodes} node{'s' * (options.nodes > 1)}, {options.dispatch}: planned on {steps // 2} {options.phase} "
        f"steps, scored on the next {steps - steps // 2}"
    )
    print_table(console, COLUMNS if timed else COLUMNS[:-1], table, title)


def _moving(console: Console, trace: Trace, devices: int) -> None:
    """What methods without a placement do, which pay for steps of many tokens if at all."""
    from carpool.placement.baselines import linear
    from carpool.placement.llep import replay

    home_LE = linear(trace.num_layers, trace.num_experts, devices).device_LE
    found = replay(trace, home_LE, devices)
    say(
        console,
        f"LLEP: peak tokens {found.at_home:.2f} -> {found.moved:.2f} of the mean, sending weights of {found.sent:.1f} "
        "experts a layer and step; MoEShard: 1.00, with every token on every device and a slice of every expert",
    )


def _share(console: Console, rows: list[Compared], trace: Trace, policy: str) -> None:
    """What a policy does on the placements that keep every expert once in order, and with replicas."""
    from carpool.placement.sharing import share

    later = trace.windows(2)[1]
    for row in rows:
        if row.planner.name in ("linear", "eplb", "eplb + replicas, metro"):
            found = share(row.placement, later, policy)
            say(
                console,
                f"{policy} on {row.planner.name}: experts of the busiest device {found.natural_peak:.2f} -> "
                f"{found.peak:.2f}, of all devices {found.natural_union:.1f} -> {found.union:.1f}; displaced "
                f"{found.displaced:.1%} of a token's weight",
            )


def _write(console: Console, options: Options, trace: Trace, placement: Placement) -> None:
    from carpool.artefacts.files import sha256_file
    from carpool.placement.export import write_ktransformers, write_sglang
    from carpool.placement.placement_file import PlacementFile

    assert options.output is not None
    layers = trace.facts.layers
    num_layers = _num_layers(console, options, layers)
    if options.format == "sglang":
        write_sglang(options.output, placement, layers, num_layers)
    elif options.format == "checkpoint":
        _write_checkpoint(options, placement)
    elif options.format == "ktransformers":
        write_ktransformers(options.output, trace, num_layers)
    else:
        PlacementFile(placement, layers, trace.facts.fingerprint, sha256_file(options.trace)).save(options.output)
    say(console, f"wrote {options.output}")


def _write_checkpoint(options: Options, placement: Placement) -> None:
    """The model with its experts in the order of the placement, which engines load as any other."""
    from carpool.artefacts.checkpoint import new_folder
    from carpool.experts.permuted import permuted
    from carpool.hosts.transformers import find_layers

    assert options.output is not None
    opened = open_model(options.model)
    model = opened.weights("auto")
    with new_folder(options.output) as folder:
        with permuted(find_layers(model), placement.expert_LDS, model.config):
            model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)


def _num_layers(console: Console, options: Options, layers: tuple[int, ...]) -> int:
    """Of the whole model, which other engines' files are about."""
    if options.model is None:
        if options.format != "carpool":
            warn(console, f"without MODEL it is taken to end with layer {layers[-1]}, the last that the trace knows")
        return layers[-1] + 1
    config = open_model(options.model).config.get_text_config()
    return int(config.num_hidden_layers)
