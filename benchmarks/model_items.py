"""Items from held-out text for the benchmarks of whole models as experts; `CORPUS` is as in the recipes."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from carpool.models.questions import Question

PROMPT, CHOICE = 240, 60  # characters
CHOICES = 4
SKILLS = 6  # words of an item


def documents(corpus: Path, domain: str, split: str = "heldout") -> list[str]:
    with (corpus / domain / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def items(corpus: Path, domains: Sequence[str], count: int, seed: int) -> list[Question]:
    """Which of four texts goes on a text? The other three are from other places of the same domain.

    Seeds 0 and 1 draw from different halves of the documents.
    """
    rng = random.Random(seed)
    made = []
    for place in range(count):
        domain = domains[place % len(domains)]
        texts = [text for text in documents_of(corpus, domain, seed) if len(text) > 2 * (PROMPT + CHOICE)]
        text = rng.choice(texts)
        start = rng.randrange(len(text) - PROMPT - CHOICE)
        answer = rng.randrange(CHOICES)
        choices = []
        for choice in range(CHOICES):
            other = rng.choice(texts)
            begin = rng.randrange(len(other) - CHOICE)
            choices.append(text[start + PROMPT :][:CHOICE] if choice == answer else other[begin : begin + CHOICE])
        words = tuple(sorted(set(re.findall(r"[^\W\d_]{2,}", text[start : start + PROMPT].lower()))))
        made.append(Question(f"{domain}-{seed}-{place}", text[start : start + PROMPT], tuple(choices), answer, words))
    return made


_cache: dict[tuple[Path, str], list[str]] = {}


def documents_of(corpus: Path, domain: str, half: int) -> list[str]:
    """Every second held-out document, from the first or the second on."""
    if (corpus, domain) not in _cache:
        _cache[corpus, domain] = documents(corpus, domain)
    return _cache[corpus, domain][half::2]


def with_skills(questions: Sequence[Question], known: Sequence[Question]) -> list[Question]:
    """The same with the words that tell most as skills: TF-IDF over `known`, words that occur there twice or more."""
    count = Counter(word for one in known for word in one.skills)
    weight = {word: math.log(len(known) / seen) for word, seen in count.items() if seen >= 2}
    made = []
    for one in questions:
        telling = sorted((word for word in one.skills if word in weight), key=lambda word: (-weight[word], word))
        made.append(Question(one.id, one.question, one.choices, one.answer, tuple(telling[:SKILLS])))
    return made


def domain_of(question: Question) -> str:
    return question.id.split("-")[0]
