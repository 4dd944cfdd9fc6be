"""Choose the held-out text that the demo distribution embeds; same corpus in, same bytes out.

Only sources whose licence allows redistribution and is known from the source's name are taken (`SOURCES`), and
of these no file that carries a notice of its own or says that it was adapted from elsewhere (`NOTICE`), and no excerpt
that largely stands in the training text, too (`FAMILIAR`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from corpus import overlap, train_lines, write_atomically

MOST_BYTES = 300_000
DOCUMENTS = 32  # of each domain
SHORTEST, LONGEST = 1_500, 2_350  # characters of a document
FAMILIAR = 0.25  # most overlap of an excerpt with the training text (packages ship some code twice)
SEED = 0

NOTICE = re.compile(
    r"copyright|licen[cs]e|\(c\)|©|\bauthors?\b|based on|\badapted\b|\bported\b|\bderived from|projecteuler"
    r"|https?://(?!\w+\.wikipedia\.org)",  # a link may name the origin of code; an encyclopaedia article does not
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """Documents of one origin: `prefix` of the corpus's source name, and what may be said about all of them."""

    domain: str
    prefix: str
    licence: str  # SPDX identifier, or "public domain"
    credit: str
    left_out: str = r"(?!)"  # a pattern over source names


# Authors who died before 1926, so that the books are free wherever copyright ends 100 years after death or earlier.
SOURCES = [
    *(
        Source("prose", f"{author}::", "public domain", f"{author} ({born}–{died})")
        for author, born, died in [
            ("Ernest Shackleton", 1874, 1922),
            ("James Fenimore Cooper", 1789, 1851),
            ("Jane Austen", 1775, 1817),
            ("R.M. Ballantyne", 1825, 1894),
            ("Thomas Hobbes", 1588, 1679),
        ]
    ),
    Source(
        "python",
        "stdlib/",
        "PSF-2.0",
        "CPython's standard library, © Python Software Foundation",
        left_out=r"/encodings/",  # tables generated from Unicode's data
    ),
    Source(
        "python",
        "TheAlgorithms/",
        "MIT",
        "TheAlgorithms/Python, © 2016–2022 The Algorithms",
        left_out=r"/project_euler/",  # restates problems whose text is under a non-commercial licence
    ),
    Source("javascript", "three-", "MIT", "three.js r187, © 2010–2026 three.js authors", left_out=r"/Addons\.js$"),
    Source("math", "gsm8k-test-", "MIT", "GSM8K (test split), © 2021 OpenAI"),
]
DOMAINS = list(dict.fromkeys(source.domain for source in SOURCES))


def excerpts(text: str) -> list[str]:
    """Consecutive runs of whole lines, at most `LONGEST` characters each; a longer line ends a run and is left out."""
    found, run = [], ""
    for line in text.splitlines(keepends=True):
        if len(run) + len(line) > LONGEST:
            found.append(run)
            run = ""
        if len(line) <= LONGEST:
            run += line
    return [run.strip("\n") + "\n" for run in [*found, run] if len(run) >= SHORTEST]


def join_problems(problems: list[dict]) -> list[dict]:
    """Word problems are short: several of them, one after the other, make one document."""
    joined, names, run = [], [], ""
    for problem in problems:
        text = problem["text"].strip("\n") + "\n"
        if len(run) + len(text) > LONGEST:
            joined.append({"source": "+".join(names), "text": run.rstrip("\n") + "\n"})
            names, run = [], ""
        names.append(problem["source"].removeprefix("gsm8k-test-") if names else problem["source"])
        run += text + "\n"
    return joined


def candidates(corpus: Path, source: Source, known: set[str], rng: random.Random) -> list[Iterator[dict]]:
    """One queue for each document of the source, in random order, of its excerpts in random order."""
    documents = []
    with (corpus / source.domain / "heldout.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            name, text = document["source"], document["text"]
            if not name.startswith(source.prefix) or re.search(source.left_out, name):
                continue
            if source.domain == "prose":
                name = name.split("::", 1)[1]
                text = text.split("\n", 1)[1]  # books are cut into parts anywhere: the first line is half a sentence
            if source.domain in ("python", "javascript") and NOTICE.search(text):
                continue
            documents.append({"source": name, "text": text})
    rng.shuffle(documents)
    if source.domain == "math":
        return [iter([document]) for document in join_problems(documents)]
    queues = []
    for document in documents:
        pieces = [piece for piece in excerpts(document["text"]) if overlap([piece], known) <= FAMILIAR]
        rng.shuffle(pieces)
        queues.append(iter([{"source": document["source"], "text": piece} for piece in pieces]))
    return queues


def choose(corpus: Path, domain: str) -> list[dict]:
    """`DOCUMENTS` documents of a domain, sources taken in turn, and within a source its documents in turn."""
    rng = random.Random(f"{SEED} {domain}")
    known = train_lines(corpus, domain)
    queues = {source: candidates(corpus, source, known, rng) for source in SOURCES if source.domain == domain}
    chosen: list[dict] = []
    while len(chosen) < DOCUMENTS:
        before = len(chosen)
        for source, waiting in queues.items():
            while waiting and len(chosen) < DOCUMENTS:
                queue = waiting.pop(0)
                document = next(queue, None)
                if document:
                    waiting.append(queue)
                    facts = {"source": document["source"], "licence": source.licence, "credit": source.credit}
                    chosen.append({**facts, "text": document["text"]})
                    break
        if len(chosen) == before:
            raise SystemExit(f"{domain}: only {before} documents of {DOCUMENTS} may be embedded; name more sources")
    return chosen


def write(corpus: Path, folder: Path) -> dict[str, list[dict]]:
    """Write `<domain>.jsonl` for each domain and return what is in them."""
    chosen = {domain: choose(corpus, domain) for domain in DOMAINS}
    files = {
        f"{domain}.jsonl": "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        for domain, documents in chosen.items()
    }
    size = sum(len(text.encode()) for text in files.values())
    if size > MOST_BYTES:
        raise SystemExit(f"the embedded text is {size:,} bytes, the most is {MOST_BYTES:,}: lower LONGEST or DOCUMENTS")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text)
    return chosen
