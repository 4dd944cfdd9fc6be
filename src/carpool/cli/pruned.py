"""`carpool compress --method reap|easy-ep|naee`: a checkpoint with fewer experts, which stock engines load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from carpool.cli.common import progress, warn
from carpool.cli.table import say
from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.calibrate.pruning import Pruning
    from carpool.calibrate.sequences import Windows
    from carpool.hosts.transformers import MoELayer, Opened

METHODS = ("reap", "easy-ep", "naee")


def require_pruning(opened: Opened, method: str, keep: int | None) -> int:
    """The number of experts to keep, if the method can leave that many; works before weights are read.

    Raises:
        CarpoolError: it cannot, or `--keep` is missing.
    """
    from carpool.calibrate.pruning import require_searchable
    from carpool.experts.pruned import require_prunable

    first = opened.layers[0]
    if keep is None:
        raise CarpoolError(
            f"--method {method} removes experts: say with --keep how many of {first.num_experts} stay in each layer"
        )
    require_prunable(opened.layers, keep, opened.config)
    if method == "naee":
        require_searchable(first.num_experts, keep)
    return keep


def write_pruned(
    console: Console,
    opened: Opened,
    windows: Windows,
    *,
    method: Pruning,
    keep: int,
    output: Path,
    data: list[tuple[str, str]],
    settings: dict[str, Any],
) -> None:
    """Choose the experts, write the checkpoint with its recipe, and measure it as stock transformers loads it."""
    from carpool.artefacts.checkpoint import Recipe, new_folder
    from carpool.calibrate.pruning import errors, kept
    from carpool.experts.pruned import pruned
    from carpool.hosts.transformers import find_layers, load_model
    from carpool.hosts.transformers import fingerprint as of_model

    model = opened.weights("auto", usual=True)
    layers = find_layers(model)
    some = kept(_statistics(model, layers, windows, method, keep), method, keep)
    with new_folder(output) as folder:
        with pruned(layers, some, model.config):
            model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
        made, _ = load_model(folder, dtype="auto")
        found = errors(model, made, windows.ids_BT[windows.held_B])
        parameters = {"keep": keep, "of": layers[0].num_experts, **settings,
                      "kept": {str(index): kept_P.tolist() for index, kept_P in some.items()}}  # fmt: skip
        Recipe(method, parameters, of_model(model), type(model).__name__, data, found).save(folder)
    say(
        console,
        f"kept {keep} of {layers[0].num_experts} experts in {len(layers)} layers; on {found['tokens']:,} tokens of "
        f"other text: KL {found['kl']:.4f} nats a token, perplexity {found['perplexity']:.3f} "
        f"(of the whole model {found['perplexity_of_source']:.3f})",
    )
    if found["kl"] > 1:
        warn(console, "this is another model rather than a smaller one: keep more experts")


def _statistics(
    model: Any, layers: list[MoELayer], windows: Windows, method: Pruning, keep: int
) -> dict[int, dict[str, Any]]:
    """What the choice needs to know of every layer, from the text that is not held out."""
    from carpool.calibrate import calibrate
    from carpool.calibrate.capture import Layer
    from carpool.calibrate.pruning import Naee

    by_name = {layer.name: layer for layer in layers}

    def searching(layer: Layer) -> Naee:
        own = by_name[layer.name]
        dtype = own.weight_EH.dtype
        return Naee(own.spec, lambda hidden_NH: own.route(hidden_NH.to(dtype))[0], own.num_experts, keep)

    ids_BT = windows.ids_BT[~windows.held_B]
    domains = [name for name, held in zip(windows.domains, windows.held_B.tolist(), strict=True) if not held]
    with progress("scoring experts", ids_BT.numel(), "tokens") as advance:
        stats = calibrate(
            model, layers, ids_BT, domains=domains, energy=method != "naee",
            collectors=[searching] if method == "naee" else [], progress=advance,
        )  # fmt: skip
    return {index: dict(tensors) for index, tensors in stats.layers.items()}
