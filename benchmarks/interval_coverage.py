"""How often the intervals of an evaluation hold the truth, simulated, beside the percentile bootstrap of whole batches.

    python benchmarks/interval_coverage.py --output docs/results/interval-coverage.json

Batches are drawn from a normal or a lognormal distribution with the scatter that the leaderboard's batches show (the
median over settings and cells, and the scatter that nine in ten stay below), or are the leaderboard's own batches drawn
with replacement, whose truth is the ratio over all of them. Statistics are those that are shown: the KL of a setting,
the perplexity ratio, the bytes read, and the KL of our method over the best published one at equal bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carpool.artefacts.files import write_text
from carpool.evaluate.equal_bytes import interpolated
from carpool.evaluate.intervals import LEVEL, METHOD, Array, interval, kept
from carpool.evaluate.results import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "leaderboard/results"
BATCHES = (10, 12, 16, 24, 48)
FEWER = (4, 6, 7)  # as were used with the bootstrap; the other interval is not given there
SHARES = (0.3, 0.5, 0.7)
LEAST = 1e-4  # nats; a setting with less is nearly stock
POOL = 12  # batches of a cell that are drawn from; of fewer the samples differ too little to stand for any others
Statistic = Callable[[Array], Array]  # of how often each batch counts, `[K, M]`, to `[K]`


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    Attributes:
        statistic, scatter: in words. draw: a statistic of so many batches, and its truth.
    """

    statistic: str
    scatter: str
    draw: Callable[[np.random.Generator, int], tuple[Statistic, float]]


def pools(paths: list[Path]) -> list[list[dict[str, Any]]]:
    """Rows of every cell with batches enough, stock first; those of several seeds one after the other."""
    found: dict[Any, list[list[dict[str, Any]]]] = {}
    for path in paths:
        for cell in json.loads(path.read_text())["cells"]:
            found.setdefault((path.stem, cell["batch"], cell["domain"]), []).append(cell["rows"])
    names = ("bytes", "kl", "nll", "tokens")
    return [
        [
            {"label": same[0]["label"], **{n: np.concatenate([np.array(row[n], float) for row in same]) for n in names}}
            for same in zip(*cells, strict=True)
        ]
        for cells in found.values()
        if sum(len(rows[0]["kl"]) for rows in cells) >= POOL
    ]


def scatters(cells: list[list[dict[str, Any]]]) -> Array:
    """Standard deviation of the logarithm of the batches' KL, of every setting in every cell."""
    found = [np.log(row["kl"] / row["tokens"]).std(ddof=1) for rows in cells for row in acting(rows) if row["kl"].all()]
    return np.array(found)


def acting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows[1:] if row["kl"].sum() / row["tokens"].sum() > LEAST]


def ratio_of(numerator_M: Array, denominator_M: Array, *, log: bool = False) -> Statistic:
    def statistic(counts_KM: Array) -> Array:
        found = (counts_KM @ numerator_M) / (counts_KM @ denominator_M)
        return np.log(found) if log else found

    return statistic


def simulated(scatter: str, sigma: float) -> Source:
    """A mean KL of 1."""

    def draw(rng: np.random.Generator, batches: int) -> tuple[Statistic, float]:
        if scatter == "normal":
            values_M = rng.normal(1, sigma, batches).clip(1e-3)
        else:
            values_M = rng.lognormal(-(sigma**2) / 2, sigma, batches)
        return ratio_of(values_M, np.ones(batches), log=True), 0.0

    return Source("KL", f"{scatter}, {sigma:.2f}", draw)


def resampled(statistic: str, cells: list[list[dict[str, Any]]]) -> Source:
    """Real batches with replacement, of a setting at random."""

    def draw(rng: np.random.Generator, batches: int) -> tuple[Statistic, float]:
        rows = cells[rng.integers(len(cells))]
        own = acting(rows)
        row, stock = own[rng.integers(len(own))], rows[0]
        sums = {
            "KL": (row["kl"], row["tokens"]),
            "perplexity ratio": (row["nll"] - stock["nll"], row["tokens"]),
            "bytes, of stock": (row["bytes"], stock["bytes"]),
        }[statistic]
        log, everything = statistic == "KL", np.ones((1, len(row["kl"])))
        drawn_M = rng.integers(len(row["kl"]), size=batches)
        truth = float(ratio_of(*sums, log=log)(everything)[0])
        return ratio_of(sums[0][drawn_M], sums[1][drawn_M], log=log), truth

    return Source(statistic, "real batches", draw)


def at_equal_bytes(cells: list[list[dict[str, Any]]]) -> Source:
    """Our KL over the best published method's, real batches with replacement."""
    found = list(pairs(cells))

    def draw(rng: np.random.Generator, batches: int) -> tuple[Statistic, float]:
        ours, best, stock, share = found[rng.integers(len(found))]
        everything = np.ones((1, len(stock["kl"])))
        drawn_M = rng.integers(len(stock["kl"]), size=batches)

        def at(rows: list[dict[str, Any]], counts_KM: Array, drawn: Any) -> Array:
            x_KI, y_KI = line(rows, stock, counts_KM, drawn)
            return interpolated(share, x_KI, y_KI)

        truth = at(ours, everything, slice(None)) - at(best, everything, slice(None))
        return lambda counts_KM: at(ours, counts_KM, drawn_M) - at(best, counts_KM, drawn_M), float(truth[0])

    return Source("KL over the best published one at equal bytes", "real batches", draw)


def line(rows: list[dict[str, Any]], stock: dict[str, Any], counts_KM: Array, drawn: Any) -> tuple[Array, Array]:
    """Shares and log KL of a method's settings."""
    shares = [(counts_KM @ row["bytes"][drawn]) / (counts_KM @ stock["bytes"][drawn]) for row in rows]
    kls = [np.log((counts_KM @ row["kl"][drawn]) / (counts_KM @ row["tokens"][drawn])) for row in rows]
    order = np.argsort([row["bytes"].sum() for row in rows])
    return np.stack(shares, 1)[:, order], np.stack(kls, 1)[:, order]


def pairs(cells: list[list[dict[str, Any]]]) -> Iterator[tuple[Any, Any, Any, float]]:
    """Settings of our method and of the best other one, stock, and a share that both reach."""
    for rows in cells:
        methods: dict[str, list[dict[str, Any]]] = {}
        for row in acting(rows):
            methods.setdefault(row["label"], []).append(row)
        everything = np.ones((1, len(rows[0]["kl"])))
        for share in SHARES:
            reached = {}
            for label, own in methods.items():
                x_KI, y_KI = line(own, rows[0], everything, slice(None))
                if x_KI[0, 0] <= share <= x_KI[0, -1]:
                    reached[label] = float(interpolated(share, x_KI, y_KI)[0])
            others = [label for label in reached if label != "ours"]
            if "ours" in reached and others:
                yield methods["ours"], methods[min(others, key=reached.__getitem__)], rows[0], share


def bootstrap(statistic: Statistic, batches: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Percentiles over draws of whole batches: the interval that was shown before."""
    counts_RM = rng.multinomial(batches, np.full(batches, 1 / batches), size=draws).astype(float)
    low, high = np.quantile(statistic(counts_RM), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def coverage(source: Source, batches: int, repeats: int, draws: int, seed: int) -> dict[str, Any]:
    """How many of `repeats` intervals hold the truth: the bootstrap's and the one that is shown."""
    rng = np.random.default_rng([seed, batches, *source.statistic.encode(), *source.scatter.encode()])
    before = after = 0
    for _ in range(repeats):
        statistic, truth = source.draw(rng, batches)
        low, high = bootstrap(statistic, batches, rng, draws)
        before += low <= truth <= high
        own = interval(statistic(kept(batches)))
        after += own[0] is not None and own[0] <= truth <= own[1]
    shown = after / repeats if batches in BATCHES else None
    return {
        "statistic": source.statistic, "scatter": source.scatter, "batches": batches,
        "bootstrap": before / repeats, "shown": shown,
    }  # fmt: skip


def sources(cells: list[list[dict[str, Any]]]) -> list[Source]:
    usual, wide = np.quantile(scatters(cells), [0.5, 0.9])
    made = [simulated(scatter, float(sigma)) for scatter in ("normal", "lognormal") for sigma in (usual, wide)]
    made += [resampled(statistic, cells) for statistic in ("KL", "perplexity ratio", "bytes, of stock")]
    return [*made, at_equal_bytes(cells)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="*", help="leaderboard results with real batches")
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    paths = given.results or [RESULTS / f"{name}.json" for name in ("frontier", "domains")]
    rows = []
    for source in sources(pools(paths)):
        for batches in (*FEWER, *BATCHES):
            rows.append(coverage(source, batches, given.repeats, given.draws, given.seed))
            print(json.dumps(rows[-1]), flush=True)
    if given.output is not None:
        settings = {"repeats": given.repeats, "draws": given.draws, "seed": given.seed, "level": LEVEL}
        facts = {"method": METHOD, "results": [path.name for path in paths], "settings": settings}
        text = ",\n  ".join(json.dumps(row) for row in rows)
        head = json.dumps(provenance() | facts, indent=1).removesuffix("\n}")
        write_text(given.output, f'{head},\n "rows": [\n  {text}\n ]\n}}\n')


if __name__ == "__main__":
    main()
