"""Text to search on, and text to verify on that the search never sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carpool.artefacts.texts import Document


def split(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Two halves of the documents, domain by domain; a domain of one document is cut in the middle."""
    rng = np.random.default_rng(seed)
    search: list[Document] = []
    verify: list[Document] = []
    for domain in dict.fromkeys(document.domain for document in documents):
        own = [document for document in documents if document.domain == domain]
        if len(own) == 1:
            middle = len(own[0].text) // 2
            search.append(Document(domain, own[0].text[:middle]))
            verify.append(Document(domain, own[0].text[middle:]))
            continue
        # by length, so that both halves hold about as much
        order = sorted(rng.permutation(len(own)).tolist(), key=lambda index: -len(own[index].text))
        for turn, index in enumerate(order):
            (search if turn % 4 in (0, 3) else verify).append(own[index])
    return search, verify
