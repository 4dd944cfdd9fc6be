"""`carpool compress`: a model's experts in planes, read as deep as a batch needs, or as other engines load them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.calibrate import require_windows
from carpool.cli.common import calibration_texts, listed, open_model, progress, require_model, require_number, warn
from carpool.cli.options import Model, Seed, Texts, WindowLength
from carpool.cli.pruned import METHODS, require_pruning, write_pruned
from carpool.cli.table import Column, Row, print_table, say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from torch import Tensor

    from carpool.artefacts.statistics import Statistics

FEW_TOKENS = 64  # an expert with fewer has hardly been seen
RECORDED = ("group", "tokens", "sequence", "seed")  # of the options, in a recipe beside method and depths


@dataclass(frozen=True)
class Options:
    """What `carpool compress` takes."""

    model: Model = None
    text: Texts = None
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to write (.safetensors), or a new folder for a checkpoint."),
    ] = Path("experts.safetensors")
    form: Annotated[
        str | None,
        typer.Option("--format", help="Of a checkpoint: planes, compressed-tensors or rounded (16 bits); by --bits."),
    ] = None
    bits: Annotated[int | None, typer.Option(help="Bits of every expert, for checkpoints that other engines load.")] = (
        None
    )
    method: Annotated[
        str,
        typer.Option(
            help="energy, moequant, gptq (error feedback, tokens counted by weight) or round; reap, easy-ep or naee "
            "write a model with fewer experts instead."
        ),
    ] = "energy"
    keep: Annotated[int | None, typer.Option(help="Experts that a pruned model keeps in each layer.")] = None
    depths: Annotated[str, typer.Option(help="Bits at which experts can be read.")] = "2,3,4,5,6"
    group: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64
    tokens: Annotated[int, typer.Option(help="Tokens to run; text that ends earlier gives fewer.")] = 60_000
    sequence: WindowLength = 128
    seed: Seed = 0


@command("compress")
def compress(options: Options) -> None:
    """Store a model's experts in bit planes, for policies that read each as deep as its batch needs.

    Layers that are done are kept beside the output until that is written: an interrupted run goes on there.
    """
    require_model(options.model)
    from carpool.calibrate import token_sequences
    from carpool.calibrate.compress import POWERS
    from carpool.cli.compress_output import Output

    console = Console()
    require_windows(options.tokens, options.sequence, options.seed)
    require_number("--group", options.group, 8, 4096)
    pruning = options.method in METHODS
    if options.method not in POWERS and not pruning:
        raise CarpoolError(f"--method {options.method}: use one of {', '.join((*POWERS, *METHODS))}")
    if options.keep is not None and not pruning:
        raise CarpoolError(f"--keep {options.keep}: it goes with --method {', '.join(METHODS)}, which remove experts")
    if pruning:
        prune(console, options)
        return
    output = Output.of(options.output, options.form, options.bits)
    depths = _depths(options.depths) if options.bits is None else (options.bits,)
    documents, data = calibration_texts(console, options.text)
    opened = open_model(options.model)
    output.check(opened, options.group)
    windows = token_sequences(documents, opened.tokenizer, options.tokens, options.sequence, options.seed, True)
    model = opened.weights(usual=True)
    stats, kept = make(model, windows, depths, options, data, output.centre)
    show(console, stats, depths)
    recorded = {name: getattr(options, name) for name in RECORDED}
    output.write(opened, model, stats, options.method, {"depths": list(depths), **recorded})
    kept.remove()
    say(console, f"wrote {options.output}")


def prune(console: Console, options: Options) -> None:
    """Write a model with fewer experts."""
    from carpool.artefacts.checkpoint import require_new_folder
    from carpool.calibrate import token_sequences

    if options.bits is not None or options.form is not None:
        raise CarpoolError(
            f"--method {options.method} removes experts and quantises none: leave out --bits and --format"
        )
    require_new_folder(options.output)
    documents, data = calibration_texts(console, options.text)
    opened = open_model(options.model)
    keep = require_pruning(opened, options.method, options.keep)
    windows = token_sequences(documents, opened.tokenizer, options.tokens, options.sequence, options.seed, True)
    settings = {"tokens": windows.ids_BT.numel(), "sequence": options.sequence, "seed": options.seed}
    write_pruned(
        console, opened, windows, method=options.method, keep=keep, output=options.output, data=data,  # type: ignore[arg-type]  # checked
        settings=settings,
    )  # fmt: skip
    say(console, f"wrote {options.output}, which stock transformers and vLLM load as any other model")


def make(
    model: Any, windows: Any, depths: tuple[int, ...], options: Options, data: list[tuple[str, str]], centre: float
) -> tuple[Statistics, Kept]:
    """Quantise all layers, those that an earlier run has left excepted; with where they are kept until all is written.

    Args:
        centre: of a cell of the quantiser.
    """
    from carpool.artefacts.identity import fingerprint
    from carpool.calibrate.compress import compress as run
    from carpool.calibrate.run import signed
    from carpool.hosts.transformers import find_layers

    layers = find_layers(model)
    name = fingerprint((layer.index, layer.weight_EH) for layer in layers)
    kept = Kept(options.output, [name, options.method, depths, options.group, options.tokens, options.sequence,
                                 options.seed, data, centre])  # fmt: skip
    known = kept.read()
    with progress("compressing", len(layers), "layers") as advance:
        advance(len(known))
        if known:
            advance.say(f"{len(known)} layers are done: going on from {kept.folder}")

        def done(index: int, tensors: dict[str, Tensor]) -> None:
            kept.write(index, tensors)
            advance(1)

        found = run(
            model, layers, windows.ids_BT, windows.held_B, depths=depths, group=options.group,
            method=options.method, centre=centre,  # type: ignore[arg-type]  # checked
            seed=options.seed, known=known, done=done,
        )  # fmt: skip
    stats = signed(
        model, layers, found, hidden_size=layers[0].weight_EH.shape[1], tokens=windows.ids_BT.numel(),
        seed=options.seed, data=data,
    )  # fmt: skip
    return stats, kept


class Kept:
    """Layers that are done, beside the output, until it is written; only runs with the same arguments see them."""

    def __init__(self, output: Path, arguments: list[Any]) -> None:
        self.folder = output.with_name(f"{output.name}.layers")
        self._arguments = repr(arguments)

    def read(self) -> dict[int, dict[str, Tensor]]:
        """What an earlier run with these arguments has done."""
        from carpool.artefacts.files import read_safetensors

        found: dict[int, dict[str, Tensor]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            tensors, metadata = read_safetensors(path)
            if metadata.get("arguments") == self._arguments and path.stem.isdigit():
                found[int(path.stem)] = tensors
        return found

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        from carpool.artefacts.files import atomic_path

        self.folder.mkdir(exist_ok=True)
        whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        with atomic_path(self.folder / f"{index}.safetensors") as temporary:
            save_file(whole, temporary, {"arguments": self._arguments})

    def remove(self) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def show(console: Console, stats: Statistics, depths: tuple[int, ...]) -> None:
    """What each depth takes and loses, and which experts the text hardly reached."""
    from carpool.calibrate.compress import lost
    from carpool.experts.stored import StoredExperts

    columns = [
        Column("layer", kind="word"),
        *(Column(f"{depth} bits", "share of the experts' output energy that is lost", rank=depth) for depth in depths),
    ]
    rows = [
        Row([str(index), *(f"{share:.2%}" for share in lost(tensors).tolist())])
        for index, tensors in stats.layers.items()
    ]
    print_table(console, columns, rows)
    first = next(iter(stats.layers.values()))
    stored = StoredExperts.of(first)
    sizes = stored.sizes
    say(
        console,
        "read at " + ", ".join(f"{depth} bits: {float(sizes[depth]):.1%}" for depth in depths) + " of 16 bits; stored: "
        f"{stored.share_stored:.1%}, scales included",
    )
    few = [
        f"{index}:{expert} ({count})"
        for index, tensors in stats.layers.items()
        for expert, count in enumerate(tensors["coverage"].tolist())
        if count < FEW_TOKENS
    ]
    if few:
        warn(
            console,
            f"these experts (layer:expert) got fewer than {FEW_TOKENS} tokens: {listed(few)}; those without any are "
            "rounded to the nearest; give more or more varied text",
        )


def _depths(text: str) -> tuple[int, ...]:
    from carpool.experts.planes import MOST_BITS

    parts = text.split(",")
    good = all(part.strip().isdigit() for part in parts)
    depths = sorted({int(part) for part in parts}) if good else []
    if not good or depths[0] < 1 or depths[-1] > MOST_BITS:
        raise CarpoolError(f"--depths {text}: give numbers of bits from 1 to {MOST_BITS}, such as 2,3,4,6")
    return tuple(depths)
