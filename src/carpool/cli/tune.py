"""`carpool tune`: a policy file that keeps a quality target and reads as little as it can."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from carpool.cli.app import command
from carpool.cli.common import (
    embedded_texts,
    may_be_shipped,
    open_model,
    progress,
    require_model,
    require_number,
    warn_of_same_text,
)
from carpool.cli.tune_files import write
from carpool.cli.tune_options import Options, Prepared
from carpool.cli.tune_trials import batch_sizes, draw, elsewhere, trials
from carpool.cli.tune_view import again, as_dict, show
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.calibrate.sequences import Windows
    from carpool.evaluate.layout import Layout
    from carpool.evaluate.loop import MoE
    from carpool.tune import Family

RANK = 16  # of the surrogates, where statistics are made on the way
CALIBRATION, WINDOW = 20_000, 256  # tokens for them, and of a sequence


@command("tune")
def tune(options: Options) -> None:
    """Find the policy that reads least within a quality target, verify it on unseen text, write a policy file."""
    require_model(options.model)
    from carpool.tune import Target
    from carpool.tune import tune as search_for

    console = Console(soft_wrap=True, highlight=False, stderr=options.as_json)
    target = Target(options.max_kl, options.max_perplexity_ratio, options.share)
    ready = prepare(console, options)
    memory = options.output.with_name(f".{options.output.name}.progress")
    with progress("tuning", _expected(ready.families, ready.moe), "trials") as bar:
        search, verify = trials(ready, options, memory, lambda policy: bar(1))
        if search.points:
            bar.say(f"resuming after {len(search.points)} trials, which {memory} has kept")
        try:
            found = search_for(ready.families, target, search, verify, bar.say)
        except KeyboardInterrupt:
            for said in again(options, len(search.points), memory):
                bar.say(said)
            raise
        except CarpoolError:
            memory.unlink(missing_ok=True)
            raise
    others = elsewhere(options, ready, target, found, verify)
    files = write(options, ready, target, found, search, verify, others)
    memory.unlink(missing_ok=True)
    show(console, options, target, found, ready.verify.batches, files, others)
    if options.as_json:
        typer.echo(json.dumps(as_dict(options, target, found, files, others), indent=1))
    if not found.met:
        raise typer.Exit(1)


def prepare(console: Console, options: Options) -> Prepared:
    """Split and draw the text, load the model, make statistics where some are needed and none are there; raises
    CarpoolError for what does not fit, before weights are read."""
    from carpool.artefacts.files import sha256_file
    from carpool.artefacts.shipped import shipped_with
    from carpool.artefacts.statistics import Statistics, made_by
    from carpool.artefacts.texts import load_texts
    from carpool.calibrate import token_sequences
    from carpool.evaluate.sequences import Cut
    from carpool.evaluate.study import describe_layers
    from carpool.experts.stored import NAMES
    from carpool.hosts.transformers import find_layers, identity
    from carpool.plans.grammar import PLANES
    from carpool.tune import bounded, measurable, on_planes
    from carpool.tune.split import split

    families, layout = check(options)
    paths = options.text or embedded_texts()
    data = [(path.name, sha256_file(path)) for path in paths]
    halves = split(load_texts(paths))
    if halves.dropped:
        console.print(f"{halves.dropped} documents say what others say and are left out")
    opened = open_model(options.model)
    moe = describe_layers(opened.layers)
    families = [one for one in families if one.knob == "bytes" or one.values(moe.experts, moe.top_k)]
    both = (halves.search, halves.verify)
    with progress("tokenizing", sum(len(document.text) for half in both for document in half)) as advance:
        cuts = [
            Cut.of(half, opened.tokenizer, length=options.sequence, seed=options.seed, progress=advance)
            for half in both
        ]
    search, verify = (draw(cut, options, layout) for cut in cuts)
    shipped = opened.planes or may_be_shipped(opened) if options.stats is None else None
    needy = options.stats is None and any(one.required_stats for one in families)

    def cut() -> Windows:
        return token_sequences(halves.search, opened.tokenizer, CALIBRATION, WINDOW, options.seed, True)

    windows, made = cut() if needy and shipped is None else None, None
    model = opened.weights(device_map=options.device_map)
    model_id = identity(find_layers(model))
    statistics = options.stats or opened.planes or (None if shipped is None else shipped_with(model_id))
    if needy and statistics is None:
        statistics = made = _calibrate(model, cut() if windows is None else windows, options, data)
    depths: tuple[int, ...] = ()
    own = NAMES if opened.in_planes and statistics == opened.planes else ()
    if statistics is not None:
        if made is None:
            loaded = Statistics.load(statistics, own)
            warn_of_same_text(console, [one.plan for one in families], loaded, paths)
        known = Statistics.load(statistics, own).for_layer(opened.layers[0].index)
        families = bounded(families if options.policy else measurable(families, known), known)
        depths = tuple(known[PLANES][3:].tolist()) if PLANES in known else ()
        if depths and not options.policy:
            families[1:1] = bounded(measurable(on_planes(depths, moe.top_k), known), known)
    families = [one for one in families if one.values(moe.experts, moe.top_k)]
    if not families:
        raise CarpoolError(f"{statistics} holds no experts in planes; make them with `{made_by('planes_shape')}`")
    return Prepared(
        families, layout, data, search, verify, cuts[1], depths, model, moe, model_id, statistics, opened.planes, made
    )


def check(options: Options) -> tuple[list[Family], Layout]:
    """Families and layout; raises CarpoolError for options that are wrong whatever the model is."""
    from carpool.artefacts.files import require_writable
    from carpool.evaluate.intervals import FEWEST
    from carpool.evaluate.layout import Layout
    from carpool.routing.batch import Grouping
    from carpool.tune import DEFAULT, family

    families = [family(one) for one in options.policy or DEFAULT]
    require_number("--seed", options.seed, 0)
    batch_sizes(options.also_batch)
    layout = Layout(options.batch, options.sequence, options.prefill, Grouping.parse(options.group))
    least = FEWEST * layout.batch_size * layout.decoded
    if options.tokens is not None and options.tokens < least:
        raise CarpoolError(
            f"--tokens {options.tokens} is less than {FEWEST} batches of {options.batch}, and fewer do not show how "
            f"sure a measurement is: give {least} or more, or lower --batch or --sequence"
        )
    require_writable(options.output, ".json")
    return families, layout


def _calibrate(model: Any, windows: Windows, options: Options, data: list[tuple[str, str]]) -> Path:
    """Statistics beside the policy file; those of an interrupted run are taken up."""
    from carpool.artefacts.statistics import Statistics
    from carpool.calibrate import calibrate
    from carpool.calibrate.surrogate_fit import SurrogateFit
    from carpool.hosts.transformers import find_layers, identity

    path, seed = options.output.with_suffix(".safetensors"), options.seed
    searched = [(f"{name}, the half that was searched", digest) for name, digest in data]
    if path.exists():
        old = Statistics.load(path)
        with suppress(CarpoolError):
            old.check(identity(find_layers(model)))
            if (old.seed, list(old.data)) == (seed, searched):
                return path
        raise CarpoolError(f"{path} holds other statistics; name it with --stats, move it, or choose another --output")
    with progress("calibrating", windows.ids_BT.numel(), "tokens") as advance:
        made = calibrate(
            model, find_layers(model), windows.ids_BT, domains=windows.domains, held_B=windows.held_B, data=searched,
            seed=seed, energy=True, collectors=[lambda layer: SurrogateFit(layer, RANK)], progress=advance,
        )  # fmt: skip
    made.save(path)
    return path


def _expected(families: Iterable[Family], moe: MoE) -> int:
    """Trials of a search, about: a bisection a family, and some to verify."""
    # a family that cannot beat an earlier one is soon left
    bisections = sum(
        ceil(log2(len(one.values(moe.experts, moe.top_k)) + 1)) if place == 0 else 2
        for place, one in enumerate(families)
    )
    return bisections + 2  # one verification or two
