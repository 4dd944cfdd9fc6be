"""`carpool calibrate`: how similar are a model's experts on some text?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import calibration_texts, listed, open_model, progress, require_model, require_number, warn
from carpool.cli.options import Model, Seed, Texts, WindowLength
from carpool.cli.table import DETAIL, Column, Row, print_table

if TYPE_CHECKING:
    from carpool.artefacts.statistics import Statistics
    from carpool.calibrate.sequences import Windows

ABOUT = {
    "routed": "1 less the error that the replacement makes where it would be made: 1 is none, 0 as wrong as nothing",
    "cosine": "of their outputs on the same tokens",
    "frobenius": "of their outputs' distance, over the layer's largest",
    "cka": "of how they arrange tokens, up to rotation and scale",
}
RANKS = {"routed": 2, "cosine": 3, "frobenius": 4}  # of similarities, where there is no room for all
FEW_TOKENS = 32  # an expert's row of `routed` from fewer tokens is mostly noise
PREDICTED = 4  # tokens for each coefficient of the norm predictor


@dataclass(frozen=True)
class Options:
    """What `carpool calibrate` takes."""

    model: Model = None
    text: Texts = None
    output: Annotated[Path, typer.Option("--output", "-o", help="Statistics file to write.")] = Path(
        "stats.safetensors"
    )
    tokens: Annotated[int, typer.Option(help="Tokens to run; text that ends earlier gives fewer.")] = 20_000
    sequence: WindowLength = 256
    seed: Seed = 0
    energy: Annotated[
        bool,
        typer.Option(help="Also what `base` and `allow_list` need: output norms, their predictor, scores by domain."),
    ] = False
    sensitivity: Annotated[
        bool, typer.Option(help="Also what `layer_threshold` needs: one more forward pass, and one for each layer.")
    ] = False
    surrogates: Annotated[
        int | None,
        typer.Option(
            help="Also what `surrogate` needs: linear maps of this rank in place of experts; "
            "0: their mean outputs (MoNE)."
        ),
    ] = None


@command("calibrate")
def calibrate(options: Options) -> None:
    """Measure how well each expert stands in for each other one, and write it beside its provenance."""
    require_model(options.model)
    from carpool.artefacts.files import require_writable
    from carpool.calibrate import token_sequences

    console = Console()
    require_windows(options.tokens, options.sequence, options.seed)
    require_number("--surrogates", options.surrogates, 0)
    require_writable(options.output, ".safetensors")
    documents, data = calibration_texts(console, options.text)
    opened = open_model(options.model)
    windows = token_sequences(
        documents, opened.tokenizer, options.tokens, options.sequence, options.seed, options.surrogates is not None
    )
    stats = measure(opened.weights(usual=True), windows, options, data)
    stats.save(options.output)
    show(console, stats, windows, options)
    console.print(f"wrote {options.output}", highlight=False, markup=False, soft_wrap=True)


def measure(model: Any, windows: Windows, options: Options, data: list[tuple[str, str]]) -> Statistics:
    """All statistics that were asked for."""
    from carpool.calibrate import calibrate as run
    from carpool.calibrate.sensitivity import sensitivity
    from carpool.calibrate.surrogate_fit import SurrogateFit
    from carpool.hosts.transformers import find_layers

    layers, total, rank = find_layers(model), windows.ids_BT.numel(), options.surrogates
    with progress("calibrating", total, "tokens") as advance:
        stats = run(
            model, layers, windows.ids_BT,
            domains=windows.domains, held_B=None if rank is None else windows.held_B, data=data, seed=options.seed,
            energy=options.energy,
            collectors=[] if rank is None else [lambda layer: SurrogateFit(layer, rank)],
            progress=advance,
        )  # fmt: skip
    if not options.sensitivity:
        return stats
    with progress("leaving layers out", total * (1 + len(layers)), "tokens") as advance:
        found = sensitivity(model, layers, windows.ids_BT, progress=advance)
    return replace(stats, layers={index: {**tensors, **found[index]} for index, tensors in stats.layers.items()})


def show(console: Console, stats: Statistics, windows: Windows, options: Options) -> None:
    """What was found, and where it is thin."""
    _show_similarities(console, stats)
    if options.energy:
        if stats.tokens < PREDICTED * (stats.hidden_size + 1):
            warn(
                console,
                f"the predictor of output norms has {stats.hidden_size + 1} coefficients an expert and saw "
                f"{stats.tokens:,} tokens, so that `base` foresees little of other text; raise --tokens to "
                f"{PREDICTED * (stats.hidden_size + 1):,} or more",
            )
        _show_domains(console, stats, list(dict.fromkeys(windows.domains)))
    if options.surrogates is not None:
        _show_surrogates(console, stats, int(windows.held_B.sum()) * windows.ids_BT.shape[1])


def require_windows(tokens: int, sequence: int, seed: int) -> None:
    """Raises CarpoolError for numbers that no calibration text can be cut by."""
    from carpool.artefacts.statistics import MIN_TOKENS

    require_number("--tokens", tokens, MIN_TOKENS)
    require_number("--sequence", sequence, 8)
    require_number("--seed", seed, 0, 2**63 - 1)


def _show_similarities(console: Console, stats: Statistics) -> None:
    """A line per layer: coverage, and the median (10th to 90th percentile) of every similarity between experts."""
    import torch

    from carpool.artefacts.tensor_checks import SIMILARITIES

    other_EE = ~torch.eye(stats.num_experts, dtype=torch.bool)
    points = torch.tensor([0.5, 0.1, 0.9])
    heads = [name.removeprefix("similarity_") for name in SIMILARITIES]
    columns = [Column("layer"), Column("fewest tokens", "of its experts", rank=1)]
    columns += [Column(head, ABOUT.get(head, ""), rank=RANKS.get(head, DETAIL)) for head in heads]
    rows = []
    few: dict[str, int] = {}
    for index, tensors in stats.layers.items():
        coverage_E = tensors["coverage"]
        spread = [tensors[name][other_EE].quantile(points).tolist() for name in SIMILARITIES]
        shown = [f"{median:.2f} ({low:.2f} to {high:.2f})" for median, low, high in spread]
        rows.append(Row([str(index), str(int(coverage_E.min())), *shown]))
        few |= {f"{index}:{expert}": n for expert, n in enumerate(coverage_E.tolist()) if n < FEW_TOKENS}
    title = f"similarity of two experts, median (10th to 90th percentile), over {stats.tokens:,} tokens:"
    print_table(console, columns, rows, title)
    unseen = [name for name, n in few.items() if n == 0]
    if unseen:
        warn(
            console,
            f"no token reached these experts (layer:expert), so nothing is known of their use: {listed(unseen)}; "
            "give more or more varied text",
        )
    if len(few) > len(unseen):
        warn(
            console,
            f"these experts (layer:expert) got fewer than {FEW_TOKENS} tokens, so that `routed` says little about "
            f"replacing them: {listed([f'{name} ({n})' for name, n in few.items() if n])}; give more or more varied "
            "text",
        )


def _show_domains(console: Console, stats: Statistics, domains: list[str]) -> None:
    """Which domains `allow_list` can name, and how many tokens their scores come from."""
    tensors = next(iter(stats.layers.values()))
    tokens = {domain: int(tensors[f"coverage/{domain}"].sum()) // stats.top_k for domain in domains}
    names = ", ".join(f"{domain!r} ({count:,} tokens)" for domain, count in tokens.items())
    if "easy_ep" in tensors:
        said = f"domains with scores of their own, for `carpool allow-list --domain`: {names}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    else:
        warn(
            console,
            f"the residual stream of {stats.architecture} was not found (its layers scale or normalise what experts "
            "add), so there are no EASY-EP scores and no `allow_list(size=...)`",
        )


def _show_surrogates(console: Console, stats: Statistics, held: int) -> None:
    """Energy that the surrogates explain on tokens that they were not fitted to, by layer, and experts without any."""
    shares, none = [], []
    for index, tensors in stats.layers.items():
        energy_E = tensors["surrogate_energy"] * tensors["coverage"]
        explained = 1 - float((energy_E * tensors["surrogate_unexplained"]).sum() / energy_E.sum().clamp_min(1e-30))
        shares.append(f"{explained:.0%} in layer {index}")
        none += [f"{index}:{expert}" for expert in (tensors["surrogate_unexplained"] == 1).nonzero().flatten().tolist()]
    said = f"surrogates explain {', '.join(shares)} of the experts' output energy on {held:,} tokens of other documents"
    console.print(said, highlight=False, soft_wrap=True)
    if none:
        warn(
            console,
            "these experts (layer:expert) got no surrogate, for lack of tokens to fit or to measure it: "
            f"{listed(none)}; give more or more varied text",
        )
