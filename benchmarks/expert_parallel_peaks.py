"""Experts on the busiest device, stock against `xshare_expert_parallel`, for 2 to 32 devices. Counts, not times.

    python benchmarks/expert_parallel_peaks.py --output docs/results/expert-parallel-simulated.json
    python benchmarks/expert_parallel_peaks.py --reference --output docs/results/expert-parallel-recorded.json

The first routes at random, the second records routing on the reference model and its texts; `--model MODEL --text FILE`
records it on another.
Every step routes `--batch` tokens drawn at random; experts lie in order on the devices. A simulated router draws
logits from a normal distribution with a bias per expert, so that some experts are popular.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from carpool import Batch, RouteSpec, parse, route
from carpool.artefacts.files import write_text
from carpool.evaluate.results import provenance

DEVICES = (2, 4, 8, 16, 32)
SHARES = (0.25, 0.5)  # of a device's experts


def simulated(rows: int, num_experts: int, generator: torch.Generator) -> Tensor:
    bias_E = torch.randn(num_experts, generator=generator) / 2
    return torch.randn(rows, num_experts, generator=generator) * 1.5 + bias_E


def recorded(model_path: str | None, texts: list[Path], tokens: int) -> tuple[list[Tensor], RouteSpec, str]:
    """Router logits `[N, E]` of every layer over text of all files, the first layer's routing rule, and the model's
    fingerprint."""
    from carpool.artefacts.texts import load_texts
    from carpool.calibrate import token_sequences
    from carpool.hosts.transformers import find_layers, fingerprint, load_model

    model, tokenizer = load_model(model_path)
    layers = find_layers(model)
    seen: list[list[Tensor]] = [[] for _ in layers]
    for layer, found in zip(layers, seen, strict=True):
        layer.router.register_forward_hook(
            lambda module, args, output, layer=layer, found=found: found.append(layer.routed(output)[0])
        )
    windows = token_sequences(load_texts(texts), tokenizer, tokens, 256, 0)
    with torch.inference_mode():
        for ids_BT in track(windows.ids_BT.split(4), "recording"):
            model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    return [torch.cat(found)[:tokens] for found in seen], layers[0].spec, fingerprint(model)


def measure(logits_NE: Tensor, spec: RouteSpec, text: str, devices: int, batch: int) -> dict[str, float]:
    """Means over steps; a step is `batch` consecutive rows of `logits_NE`."""
    num_experts = logits_NE.shape[1]
    steps = len(logits_NE) // batch
    step_N = torch.arange(steps * batch) // batch
    device_E = torch.arange(num_experts) * devices // num_experts
    rows = Batch.of(len(step_N), group_N=step_N, num_groups=steps, step_N=step_N, num_steps=steps, device_E=device_E)
    outcome = route(parse(text), spec, logits_NE[: len(step_N)], rows)
    on_device_ED = torch.nn.functional.one_hot(device_E, devices).double()

    def peak(mask_SE: Tensor) -> float:
        return float((mask_SE.double() @ on_device_ED).amax(-1).mean())

    return {
        "peak_stock": peak(outcome.natural_SE),
        "peak": peak(outcome.union_SE),
        "union_stock": float(outcome.natural_SE.sum(-1).double().mean()),
        "union": float(outcome.union_SE.sum(-1).double().mean()),
        "displaced_mass": float(outcome.displaced_N.double().mean()),
        "rows_changed": float(outcome.changed_N.double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers model, to record its routing")
    parser.add_argument("--text", type=Path, nargs="+", help="the text to record it on")
    parser.add_argument("--reference", action="store_true", help="record the reference model on its own texts")
    parser.add_argument("--experts", type=int, default=256, help="of the simulated layer (256: DeepSeek-R1)")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.reference:
        from carpool_demo import TEXTS

        options.text = sorted(TEXTS.glob("*.jsonl"))
    elif (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    generator = torch.Generator().manual_seed(options.seed)
    rows = options.batch * options.steps
    model: dict[str, str] = {}
    if options.text is None:
        spec, layers = RouteSpec(options.top_k), [simulated(rows, options.experts, generator)]
    else:
        layers, spec, named = recorded(options.model, options.text, rows)
        model = {"name": Path(options.model or "reference model").name, "fingerprint": named}
        # tokens of one step come from all over the text, as those of co-batched requests do
        layers = [logits_NE[torch.randperm(len(logits_NE), generator=generator)] for logits_NE in layers]
    if len(layers[0]) < options.batch:
        parser.error(f"the text has {len(layers[0])} tokens, fewer than a batch of {options.batch}")

    num_experts = layers[0].shape[1]
    results: list[dict[str, Any]] = []
    settings = [(n, s, w) for n in DEVICES if num_experts % n == 0 for s in SHARES for w in (0, 1)]
    for devices, share, warmup in track(settings, "routing"):
        text = f"xshare_expert_parallel({share}, warmup={warmup})"
        for layer, logits_NE in enumerate(layers):
            measured = measure(logits_NE, spec, text, devices, options.batch)
            results.append({"devices": devices, "policy": text, "layer": layer, **measured})
    about = {
        **provenance(),
        "routing": "simulated" if options.text is None else "recorded",
        **({"model": model} if model else {}),
        "experts": num_experts,
        "top_k": spec.top_k,
        "batch": options.batch,
        "steps": len(layers[0]) // options.batch,
        "seed": options.seed,
    }
    write_text(options.output, json.dumps({**about, "results": results}, indent=1) + "\n")
    for row in results:
        print(
            f"{row['devices']:3d} devices, layer {row['layer']}, {row['policy']}: peak {row['peak_stock']:.1f} -> "
            f"{row['peak']:.1f}, union {row['union_stock']:.0f} -> {row['union']:.0f}, "
            f"displaced {row['displaced_mass']:.2f}"
        )


if __name__ == "__main__":
    main()
