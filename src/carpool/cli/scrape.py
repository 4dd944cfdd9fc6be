"""What a running server says of sharing on its `/metrics` page, and what follows from it."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic

from carpool.errors import CarpoolError

TIMEOUT = 10.0  # seconds
OURS = "carpool_"
BESIDE = {
    "vllm:num_requests_running": "requests",
    "vllm:generation_tokens_total": "tokens",
}  # of the engine, if it says


@dataclass(frozen=True)
class Scrape:
    """Metrics at one moment.

    Attributes:
        at: seconds of a clock that only goes forward. values: sums over engines, by name.
    """

    at: float
    values: Mapping[str, float]

    def since(self, before: Scrape) -> Scrape | None:
        """What happened in between; `at` is how long it took. None where the server has started anew."""
        grown = {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}
        if any(change < 0 for name, change in grown.items() if name.endswith("_total")):
            return None
        return Scrape(self.at - before.at, grown)

    def ratio(self, over: str, under: str) -> float | None:
        """Of two totals, named without `carpool_` and `_total`; None where the second is not there or 0."""
        top, bottom = self.total(over), self.total(under)
        return None if top is None or not bottom else top / bottom

    def total(self, name: str) -> float | None:
        """A total of ours; None where the server has none of that name."""
        return self.values.get(f"{OURS}{name}_total")


def metrics_url(given: str) -> str:
    """Where a server's metrics are: `host:port`, a server's address or the page itself.

    Raises:
        CarpoolError: no address of a server.
    """
    address = given if "://" in given else f"http://{given}"
    try:
        parts = urllib.parse.urlsplit(address)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise CarpoolError(f"{given!r} is no address of a server; give one such as http://localhost:8000")
    return urllib.parse.urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/metrics"))


def scrape(url: str) -> Scrape:
    """Read a page of metrics.

    Raises:
        CarpoolError: no answer, no such page, or a page without metrics of Carpool.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except urllib.error.HTTPError as error:
        raise CarpoolError(
            f"{url} answers {error.code} ({error.reason}); name a server that has a page of metrics"
        ) from None
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise CarpoolError(f"no answer from {url} ({reason}); is the server running there?") from None
    except ValueError:
        raise CarpoolError(f"{url} is no page of Prometheus metrics; name a server that vLLM runs") from None
    values: dict[str, float] = {}
    for sample in samples:
        name = BESIDE.get(sample.name, sample.name)
        if name.startswith(OURS) or sample.name in BESIDE:
            values[name] = values.get(name, 0.0) + sample.value
    if not any(name.startswith(OURS) for name in values):
        raise CarpoolError(
            f"{url} has no metrics of Carpool; start the server with the key 'carpool' in --additional-config "
            "(docs/serve.md)"
        )
    return Scrape(monotonic(), values)
