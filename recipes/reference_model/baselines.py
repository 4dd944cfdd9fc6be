"""Unigram and 5-gram language models, the yardsticks of the model card.

The n-gram model is interpolated Kneser-Ney with three discounts an order (Chen and Goodman, "An empirical study of
smoothing techniques for language modeling", 1999): orders below the highest count in how many distinct contexts an
n-gram occurs, and every order hands what it discounts to the one below, down to the uniform distribution.

An n-gram is numbered by its rank among the distinct pairs (number of its first n-1 tokens, last token), so that a
pair always fits 64 bits, whatever n is. Everything is sorting and counting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNSEEN = -1


@dataclass
class Order:
    """One order n; `keys` are sorted pairs (context number * vocabulary + token), an n-gram's number is its rank."""

    keys: np.ndarray
    discounted: np.ndarray  # max(count - discount, 0) / total of the context, for each n-gram
    backoff: np.ndarray  # mass left for the order below, for each context


def _pairs(shorter_RT: np.ndarray, rows_RT: np.ndarray, vocabulary: int) -> np.ndarray:
    """Keys of the n-grams that end at positions 1.. of each row, from the numbers of the (n-1)-grams."""
    context_RT, token_RT = shorter_RT[:, :-1], rows_RT[:, -shorter_RT.shape[1] + 1 :]
    return np.where(context_RT == UNSEEN, UNSEEN, context_RT * vocabulary + token_RT)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts for n-grams counted 1, 2 and 3 or more times, indexed by `min(count, 3)`; 0 at index 0."""
    once, twice, thrice, four = (max(int((counts == n).sum()), 1) for n in (1, 2, 3, 4))
    share = once / (once + 2 * twice)
    raw = np.array([0.0, 1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice])
    # the formula may leave its range on very little data; at 0 a token never seen would have no probability
    return np.clip(raw, [0.0, 0.1, 0.1, 0.1], [0.0, 1.0, 2.0, 3.0])


class KneserNey:
    """Args:
    rows_RT: training rows of token ids; no n-gram crosses the end of a row
    vocabulary: number of token ids
    order: n
    """

    def __init__(self, rows_RT: np.ndarray, vocabulary: int, order: int = 5) -> None:
        self.vocabulary = vocabulary
        rows_RT = rows_RT.astype(np.int64)
        numbers, keys, counts = [rows_RT], [np.arange(vocabulary)], [np.bincount(rows_RT.ravel(), minlength=vocabulary)]
        for _ in range(order - 1):
            pairs = _pairs(numbers[-1], rows_RT, vocabulary)
            found, number, count = np.unique(pairs, return_inverse=True, return_counts=True)
            numbers.append(number.reshape(pairs.shape))
            keys.append(found)
            counts.append(count)
        for n in range(order - 1):
            # the (n+1)-grams, each seen once, name the distinct left neighbours of their last n tokens
            _, first = np.unique(numbers[n + 1], return_index=True)
            suffix = numbers[n][:, 1:].ravel()[first]
            counts[n] = np.bincount(suffix, minlength=len(keys[n]))
        self.orders = []
        for n, (key, count) in enumerate(zip(keys, counts, strict=True)):
            context, contexts = (key // vocabulary, len(keys[n - 1])) if n else (np.zeros_like(key), 1)
            total = np.maximum(np.bincount(context, weights=count, minlength=contexts), 1e-300)
            discount = _discounts(count)[np.minimum(count, 3)]
            taken = np.bincount(context, weights=discount, minlength=contexts) / total
            # a context never followed by anything leaves all of its mass to the order below
            backoff = np.where(np.bincount(context, weights=count, minlength=contexts) > 0, taken, 1.0)
            self.orders.append(Order(key, (count - discount) / total[context], backoff))

    def loss(self, stream_T: np.ndarray) -> np.ndarray:
        """Nats of each token of a stream but the first, given all before it."""
        stream_1T = stream_T.astype(np.int64)[None]
        unigram = self.orders[0]
        probability_T = unigram.discounted[stream_1T[0]] + unigram.backoff[0] / self.vocabulary
        number_1T = stream_1T
        for order in self.orders[1 : len(stream_T)]:
            pair_T = _pairs(number_1T, stream_1T, self.vocabulary)[0]
            context_T = number_1T[0, :-1]
            rank_T = np.searchsorted(order.keys, pair_T).clip(max=len(order.keys) - 1)
            seen_T = (order.keys[rank_T] == pair_T) & (pair_T != UNSEEN)
            below_T = probability_T[-len(pair_T) :]
            higher_T = np.where(seen_T, order.discounted[rank_T], 0.0) + order.backoff[context_T] * below_T
            # the first tokens of the stream have a shorter history
            head_T = probability_T[: -len(pair_T)]
            probability_T = np.concatenate([head_T, np.where(context_T == UNSEEN, below_T, higher_T)])
            number_1T = np.where(seen_T, rank_T, UNSEEN)[None]
        return -np.log(probability_T[1:])


def unigram_loss(rows_RT: np.ndarray, vocabulary: int, stream_T: np.ndarray) -> np.ndarray:
    """Nats of each token of a stream but the first; one is added to every count."""
    counts = np.bincount(rows_RT.ravel(), minlength=vocabulary) + 1.0
    return -np.log(counts / counts.sum())[stream_T[1:]]
