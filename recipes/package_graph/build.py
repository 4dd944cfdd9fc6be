"""Makes a graph of Debian's packages from the package index of the machine it runs on.

    python build.py WORK

Nodes are packages, edges their `Depends` and `Recommends` (every alternative that the index holds, read both ways), a
node's class is its section, its features are 64 latent components of its synopsis' words. Names are left out: `-dev`
and `-doc` give sections away. Nothing of the index is part of this repository: its synopses come under the licences of
some thirty thousand packages, and the index as a whole under none. Writes `WORK/graph.safetensors`, `WORK/graph.json`.

One core trains on a part: what a machine with some packages, drawn at random, could have to install (`--nodes 0`: all).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Debian 12.15, main, amd64: of `Packages` as its release file has it
SNAPSHOT = "515e692f2c4121c6fcec444ef100cc18f79a991910615f3a88c8b7becfc94d2f"
NODES = 2_000  # about as many are kept: packages drawn at random, with all that they need
COMPONENTS, FEWEST = 64, 5  # latent components; synopses that a word is in
HELPER = "/usr/lib/apt/apt-helper"
TARGETS = ["apt-get", "indextargets", "--format", "$(FILENAME)", "Created-By: Packages", "Component: main"]


def index(any_snapshot: bool) -> tuple[str, str]:
    """The index' text and its SHA-256."""
    try:
        files = subprocess.run(TARGETS, check=True, capture_output=True, text=True).stdout.split()
        texts = [subprocess.run([HELPER, "cat-file", file], check=True, capture_output=True).stdout for file in files]
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"the package index cannot be read ({error}); run this on Debian, after apt-get update")
    found = {hashlib.sha256(text).hexdigest(): text for text in texts}
    if SNAPSHOT in found:
        return found[SNAPSHOT].decode(), SNAPSHOT
    if not any_snapshot or not found:
        sys.exit(f"no index here has the SHA-256 {SNAPSHOT} (Debian 12.15); with --any-snapshot yours is taken")
    largest = max(found, key=lambda sha256: len(found[sha256]))
    return found[largest].decode(), largest


def packages(text: str) -> dict[str, dict[str, str]]:
    """The latest stanza of each name: its fields on their first lines."""
    made = {}
    for stanza in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.split("\n") if ": " in line and not line.startswith(" "))
        if "Package" in fields:
            made[fields["Package"]] = fields
    return made


def needed(fields: dict[str, str]) -> set[str]:
    """Names in `Depends` and `Recommends`, versions and architectures left off."""
    told = ", ".join(fields[name] for name in ("Depends", "Recommends") if name in fields)
    return {re.split(r"[\s(:\[]", name.strip(), maxsplit=1)[0] for name in re.split(r"[,|]", told)} - {""}


def with_needs(found: dict[str, dict[str, str]], nodes: int) -> dict[str, dict[str, str]]:
    """Packages drawn in a fixed order, each with all that it needs, until there are `nodes` or more."""
    names, kept = list(found), set[str]()
    random.Random(0).shuffle(names)
    for name in names:
        waiting = [name]
        while waiting:
            one = waiting.pop()
            if one not in kept:
                kept.add(one)
                waiting += needed(found[one]) & found.keys()
        if len(kept) >= nodes:
            break
    return {name: fields for name, fields in found.items() if name in kept}


def features(synopses: list[str]) -> Tensor:
    """Latent semantic components of the words, `[N, COMPONENTS]`, standardised."""
    rows = [Counter(re.findall(r"[a-z][a-z0-9+#]+", text.lower())) for text in synopses]
    seen = Counter(word for row in rows for word in row)
    place = {word: number for number, word in enumerate(sorted(word for word in seen if seen[word] >= FEWEST))}
    entries = [(n, place[word], 1 + torch.tensor(count).log().item()) for n, row in enumerate(rows)
               for word, count in row.items() if word in place]  # fmt: skip
    at_2X = torch.tensor([entry[:2] for entry in entries]).T
    rare_V = torch.tensor([len(rows) / seen[word] for word in place]).log()
    value_X = torch.tensor([entry[2] for entry in entries]) * rare_V[at_2X[1]]
    length_N = torch.zeros(len(rows)).index_add(0, at_2X[0], value_X.square()).sqrt().clamp_min(1e-12)
    table_NV = torch.sparse_coo_tensor(at_2X, value_X / length_N[at_2X[0]], (len(rows), len(place))).coalesce()
    torch.manual_seed(0)
    left_NQ, size_Q, _ = torch.svd_lowrank(table_NV, q=COMPONENTS, niter=4)
    made_NQ = left_NQ * size_Q
    return (made_NQ - made_NQ.mean(0)) / made_NQ.std(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--any-snapshot", action="store_true", help="take the index that is here, whatever its hash")
    parser.add_argument("--nodes", type=int, default=NODES, help="0: all")
    arguments = parser.parse_args()
    text, sha256 = index(arguments.any_snapshot)
    found = {name: fields for name, fields in sorted(packages(text).items()) if "Section" in fields}
    whole = len(found)
    found = with_needs(found, arguments.nodes or whole)
    place = {name: number for number, name in enumerate(found)}
    sections = sorted({fields["Section"] for fields in found.values()})
    class_N = torch.tensor([sections.index(fields["Section"]) for fields in found.values()])
    directed = sorted({(place[name], place[other]) for name, fields in found.items() for other in needed(fields)
                       if other in place and other != name})  # fmt: skip
    needs_2M = torch.tensor(directed).T.flip(0)  # from what is needed
    edges_2M = torch.cat([needs_2M, needs_2M.flip(0)], dim=1).unique(dim=1)
    x_NF = features([fields.get("Description", "") for fields in found.values()])
    degree_N = torch.bincount(edges_2M[1], minlength=len(found))
    alike = (class_N[edges_2M[0]] == class_N[edges_2M[1]]).double().mean()
    told = {
        "sha256": sha256, "of": whole, "nodes": len(found), "directed_edges": len(directed), "edges": edges_2M.shape[1],
        "classes": len(sections), "largest_class": int(torch.bincount(class_N).max()),
        "homophily": round(float(alike), 4), "isolated": int((degree_N == 0).sum()),
        "largest_degree": int(degree_N.max()), "features": COMPONENTS,
    }  # fmt: skip
    arguments.work.mkdir(parents=True, exist_ok=True)
    made = {"x": x_NF, "edges": edges_2M, "needs": needs_2M, "class": class_N}
    save_file({name: one.contiguous() for name, one in made.items()}, arguments.work / "graph.safetensors")
    (arguments.work / "graph.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
