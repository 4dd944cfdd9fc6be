"""Fill the demo distribution: model, card and embedded held-out text. The last command of the recipe.

    export OMP_NUM_THREADS=2
    python package.py WORK CORPUS         # then: pip install ./demo

WORK is what `corpus.py` and `train.py` filled, CORPUS the folder with the text. The same input gives the same files.
The exit status is 1 if an expert's load is out of the recipe's bounds; the files are written nevertheless.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path
from string import Template

import card
import texts
from corpus import HERE, TELLING, write_atomically

DEMO = HERE.parents[1] / "demo"
MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
DATA = {
    "prose": ("books of the 19th and early 20th century", "public domain"),
    "python": ("CPython's standard library and well-known packages", "PSF, BSD, MIT"),
    "javascript": ("well-known npm packages", "MIT, Apache-2.0, ISC, BSD"),
    "math": ("GSM8K word problems", "MIT"),
    "german": ("translated manual pages", "free licences, mostly GPL"),
    "french": ("translated manual pages", "free licences, mostly GPL"),
}


def copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        temporary = target / f"{name}.tmp"
        shutil.copyfile(source / name, temporary)
        temporary.replace(target / name)


def table(rows: list[tuple]) -> str:
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def loss_rows(facts: dict) -> list[tuple]:
    rows = []
    for domain, found in facts["domains"].items():
        loss, bits = found["loss"], found["bits_per_character"]
        cells = [f"{loss[name]:.2f} ({bits[name]:.2f})" for name in ("model", "ngram", "unigram")]
        low, high = loss["model_interval"]
        known = f"{found['lines_also_in_training']:.0%}"
        rows.append((domain, cells[0], f"{low:.2f} to {high:.2f}", *cells[1:], f"{found['scored_tokens']:,}", known))
    loss, bits = facts["overall"]["loss"], facts["overall"]["bits_per_character"]
    cells = [f"**{loss[name]:.2f} ({bits[name]:.2f})**" for name in ("model", "ngram", "unigram")]
    return [*rows, ("**all**, by tokens", cells[0], "", *cells[1:], "", "")]


def loss_sentence(facts: dict) -> str:
    behind = [d for d, found in facts["domains"].items() if found["loss"]["model"] > found["loss"]["ngram"]]
    if behind:
        return f"The 5-gram is better than the model on: {', '.join(behind)}."
    return "The model is better than both baselines on every domain."


def load_sentence(load: dict) -> str:
    failures = load["out_of_bounds"]
    if not failures:
        return "every expert of every layer is inside."
    return f"{len(failures)} of all layers' experts fall outside ({'; '.join(failures)})."


def text_rows(chosen: dict[str, list[dict]]) -> list[tuple]:
    rows = []
    for domain, documents in chosen.items():
        count = Counter((document["credit"], document["licence"]) for document in documents)
        for (credit, licence), number in sorted(count.items()):
            names = {document["source"] for document in documents if document["credit"] == credit}
            characters = sum(len(document["text"]) for document in documents if document["credit"] == credit)
            books = sorted({name.split("/", 1)[1].split(".md")[0] for name in names}) if domain == "prose" else []
            title = f"{credit}: {', '.join(books)}" if books else credit
            rows.append((domain, title, number, f"{characters:,}", licence))
    return rows


def readme(facts: dict, chosen: dict[str, list[dict]], text_bytes: int) -> str:
    model, train = facts["config"]["model"], facts["config"]["train"]
    load, information = facts["expert_load"], facts["mutual_information"]
    low, high = load["bounds"]
    return Template((HERE / "card_template.md").read_text(encoding="utf-8")).substitute(
        text_kilobytes=round(text_bytes / 1000),
        layers=model["num_hidden_layers"],
        experts=model["num_experts"],
        top_k=model["num_experts_per_tok"],
        hidden=model["hidden_size"],
        width=model["moe_intermediate_size"],
        vocabulary=f"{facts['config']['tokenizer']['vocab_size']:,}",
        parameters=f"{facts['parameters'] / 1e6:.1f}",
        tokens=f"{facts['training']['tokens'] / 1e6:.1f}",
        steps=f"{facts['training']['steps']:,}",
        batch=train["batch"],
        sequence=train["sequence"],
        rate=train["learning_rate"],
        decay=round(100 * train["decay_fraction"]),
        weight_decay=train["weight_decay"],
        balance=train["balance"],
        balance_in_decay=train["balance_in_decay"],
        seed=train["seed"],
        data_table=table([(d, f"{share:.0%}", *DATA[d]) for d, share in facts["config"]["mixture"].items()]),
        windows=f"up to {card.WINDOWS} ",
        loss_table=table(loss_rows(facts)),
        loss_sentence=loss_sentence(facts),
        telling=TELLING,
        familiar=f"{texts.FAMILIAR:.0%}",
        even=f"{1 / model['num_experts']:.2%}",
        low=f"{low:.1%}",
        high=f"{high:.1%}",
        load_sentence=load_sentence(load),
        expert_table=table(
            [
                (layer, f"{least:.2%}", f"{most:.2%}", f"{bits:.2f}")
                for layer, (least, most, bits) in enumerate(
                    zip(load["least"], load["most"], information["bits"], strict=True)
                )
            ]
        ),
        possible=f"{information['bits_possible']:.2f}",
        null=f"{max(information['bits_shuffled_mean']):.4f}",
        documents=texts.DOCUMENTS,
        text_table=table(text_rows(chosen)),
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--demo", type=Path, default=DEMO, help="the distribution's folder")
    arguments = parser.parse_args()
    package = arguments.demo / "src" / "carpool_demo"
    copy_model(arguments.work / "model", package / "model")
    chosen = texts.write(arguments.corpus, package / "texts")
    facts = card.write(arguments.work, arguments.corpus, package)
    size = sum(file.stat().st_size for file in (package / "texts").iterdir())
    write_atomically(arguments.demo / "README.md", readme(facts, chosen, size))
    if facts["expert_load"]["out_of_bounds"]:
        raise SystemExit("expert load: " + load_sentence(facts["expert_load"]))


if __name__ == "__main__":
    main()
