"""Put the block-diffusion model and its card into the demo distribution. The last command of the recipe.

    python ship.py WORK

WORK holds `model` (`adapt.py`), `heldout.json` (`heldout.py`) and `samples.json` (`samples.py`). The same input gives
the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from string import Template

import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reference_model"))

from corpus import write_atomically
from heldout import SHARES
from package import DEMO, copy_model, load_sentence, table

COLUMNS = [*map(str, SHARES), "bound"]


def loss_rows(facts: dict) -> list[tuple]:
    size = str(facts["config"]["train"]["default_block_size"])
    rows = []
    for domain, found in facts["domains"].items():
        loss = found["denoising"][size]
        low, high = loss["bound_interval"]
        beside = [found["next_token"], found["unigram"], found["before_adaptation"]]
        cells = [f"{loss[name]:.2f}" for name in COLUMNS]
        rows.append((domain, *cells, f"{low:.2f} to {high:.2f}", *(f"{value:.2f}" for value in beside)))
    return rows


def size_rows(facts: dict) -> list[tuple]:
    rows = []
    for size in facts["config"]["train"]["block_sizes"]:
        losses = [found["denoising"][str(size)] for found in facts["domains"].values()]
        rows.append((size, *(f"{np.mean([loss[name] for loss in losses]):.2f}" for name in COLUMNS)))
    return rows


def loss_sentence(facts: dict) -> str:
    """What the table says, of the bound at the default block size."""
    size = str(facts["config"]["train"]["default_block_size"])
    bounds = {domain: found["denoising"][size]["bound"] for domain, found in facts["domains"].items()}
    worse = [domain for domain, bound in bounds.items() if bound >= facts["domains"][domain]["unigram"]]
    behind = [domain for domain, bound in bounds.items() if bound > facts["domains"][domain]["next_token"]]
    first = f"below token frequencies on every domain but: {', '.join(worse)};" if worse else "below token frequencies,"
    second = f"and above the autoregressive model's loss on {len(behind)} of {len(bounds)} domains"
    return f"The bound is {first} {second}: filling a block in any order is harder than going on from its left."


def sample_rows(samples: dict) -> list[tuple]:
    rows = []
    for domain, found in samples["domains"].items():
        named = [f"{found['recognised'][name]:.0%}" for name in ("greedy", "sampled", "true", "blind")]
        varied = [f"{found['variety'][name]:.2f}" for name in ("greedy", "sampled", "true")]
        speed = [f"{found['tokens_per_forward'][name]:.2f}" for name in ("greedy", "sampled")]
        rows.append((domain, *named, *varied, *speed))
    return rows


def sample_sentence(samples: dict) -> str:
    def mean(kind: str, name: str) -> float:
        return float(np.mean([found[kind][name] for found in samples["domains"].values()]))

    named = {name: f"{mean('recognised', name):.0%}" for name in ("greedy", "sampled", "true", "blind")}
    return (
        f"Over all domains {named['greedy']} of the greedy and {named['sampled']} of the sampled texts are recognised "
        f"({named['true']} of true text, {named['blind']} of blind draws); the variety of greedy text is "
        f"{mean('variety', 'greedy'):.2f}, of sampled text {mean('variety', 'sampled'):.2f}, of true text "
        f"{mean('variety', 'true'):.2f}."
    )


def shown(samples: dict) -> str:
    """One prompt a domain with what followed, word for word; of domains whose text may be shown."""
    parts = []
    for domain, found in samples["domains"].items():
        if "shown" not in found:
            continue
        parts.append(f"**{domain}**: prompt, sampled, greedy\n")
        for name in ("prompt", "sampled", "greedy"):
            text = found["shown"][name].replace("```", "'''").strip("\n")
            parts.append(f"```text\n{text}\n```\n")
    return "\n".join(parts).rstrip("\n")


def readme(facts: dict, samples: dict, mask_id: int) -> str:
    train, training, load = facts["config"]["train"], facts["training"], facts["expert_load"]
    low, high = load["bounds"]
    settings = {name: value for name, value in samples["settings"].items() if name != "seed"}
    return Template((HERE / "card_template.md").read_text(encoding="utf-8")).substitute(
        mask_token=facts["config"]["tokenizer"]["mask_token"],
        mask_id=f"{mask_id:,}",
        parameters=f"{facts['parameters'] / 1e6:.1f}",
        sizes=", ".join(map(str, train["block_sizes"])),
        default_size=train["default_block_size"],
        sequence=train["sequence"],
        noisy=f"{training['noisy_tokens'] / 1e6:.2f}",
        masked=f"{training['masked_tokens'] / 1e6:.2f}",
        text=f"{training['text_tokens'] / 1e6:.2f}",
        distinct=f"{training['distinct_tokens'] / 1e6:.2f}",
        copies=train["copies"],
        steps=f"{training['steps']:,}",
        batch=train["batch"],
        rate=train["learning_rate"],
        decay=round(100 * train["decay_fraction"]),
        weight_decay=train["weight_decay"],
        balance=train["balance"],
        balance_in_decay=train["balance_in_decay"],
        seed=train["seed"],
        windows=max(found["windows"] for found in facts["domains"].values()),
        loss_sentence=loss_sentence(facts),
        loss_table=table(loss_rows(facts)),
        size_table=table(size_rows(facts)),
        even=f"{1 / len(load['of_expert'][0]):.2%}",
        low=f"{low:.1%}",
        high=f"{high:.1%}",
        load_sentence=load_sentence(load),
        expert_table=table(
            [
                (layer, f"{least:.2%}", f"{most:.2%}")
                for layer, (least, most) in enumerate(zip(load["least"], load["most"], strict=True))
            ]
        ),
        domains=len(samples["domains"]),
        sample_table=table(sample_rows(samples)),
        sample_sentence=sample_sentence(samples),
        samples=shown(samples),
        **settings,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--demo", type=Path, default=DEMO, help="the distribution's folder")
    arguments = parser.parse_args()
    work, folder = arguments.work, arguments.demo / "src" / "carpool_demo" / "diffusion_model"
    facts, samples = (json.loads((work / name).read_text()) for name in ("heldout.json", "samples.json"))
    model = json.loads((work / "model" / "training.json").read_text())
    for name, measured in (("heldout.json", facts["training"]), ("samples.json", samples["training"])):
        if measured["steps"] != model["steps"]:
            raise SystemExit(
                f"{name} is of step {measured['steps']}, the model of step {model['steps']}: measure again"
            )
    copy_model(work / "model", folder)
    mask_id = json.loads((folder / "config.json").read_text())["mask_token_id"]
    write_atomically(
        folder / "card.json", json.dumps(facts | {"samples": samples}, indent=1, ensure_ascii=False) + "\n"
    )
    write_atomically(folder / "README.md", readme(facts, samples, mask_id))


if __name__ == "__main__":
    main()
