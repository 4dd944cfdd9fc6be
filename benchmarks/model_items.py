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

PROMPT, CHOICE = 240, 40  # characters
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
        cut = at_a_word(text, rng, PROMPT)
        answer = rng.randrange(CHOICES)
        choices = []
        for choice in range(CHOICES):
            other = text if choice == answer else rng.choice(texts)
            begin = cut if choice == answer else at_a_word(other, rng, 0)
            choices.append(other[begin : begin + CHOICE])
        told = text[cut - PROMPT : cut]
        words = tuple(sorted(set(re.findall(r"[^\W\d_]{2,}", told.lower()))))
        made.append(Question(f"{domain}-{seed}-{place}", told, tuple(choices), answer, words))
    return made


def at_a_word(text: str, rng: random.Random, least: int) -> int:
    """A place before a word, with `least` characters before it and a choice's after it; any place if there is none."""
    places = [place for place in range(least, len(text) - CHOICE) if text[place] == " " and text[place + 1].isalnum()]
    return rng.choice(places) if places else rng.randrange(least, len(text) - CHOICE)


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
