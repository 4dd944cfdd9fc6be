"""The dashboard asks for metrics that the plugin has, and for all that it counts of a policy."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from carpool.hosts.engine import metrics

BOARD = json.loads((Path(__file__).parent.parent / "docs/grafana.json").read_text())


def names() -> set[str]:
    """The plugin's metrics, as Prometheus exposes them."""
    source = Path(metrics.__file__).read_text()
    gauges = set(re.findall(r'"Gauge",\s*"(carpool_\w+)"', source))
    counters = {name for name, _ in metrics.COUNTERS.values()}
    counters |= set(re.findall(r'"Counter",\s*"(carpool_\w+)"', source))
    return gauges | {f"{name}_total" for name in counters}


def queries() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def asked(prefix: str) -> set[str]:
    return {name for query in queries() for name in re.findall(rf"{prefix}\w+", query)}


def test_every_metric_of_a_query_is_the_plugins() -> None:
    assert asked("carpool_") <= names()


def test_every_counter_of_a_policy_is_shown() -> None:
    assert {f"{name}_total" for name, _ in metrics.COUNTERS.values()} - asked("carpool_") == set()


def test_the_session_of_the_page_lists_what_a_server_says() -> None:
    page = (Path(__file__).parent.parent / "docs/serve.md").read_text()
    listed = re.findall(r"^    (carpool_\w+){engine=", page, re.M)
    assert set(listed) == names()


def test_variables_are_defined() -> None:
    defined = {one["name"] for one in BOARD["templating"]["list"]} | {"__rate_interval", "__range"}
    for query in queries():
        assert set(re.findall(r"\$(\w+)", query)) <= defined
    assert "carpool_enabled" in BOARD["templating"]["list"][1]["definition"]


@pytest.mark.parametrize("query", queries())
def test_brackets_are_closed(query: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing)


def test_panels_lie_beside_each_other() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        return {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }

    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations(panels, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    assert all(x < 24 for panel in panels for x, _ in cells(panel))


def test_the_engines_own_metrics_are_there() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(found.origin).parent / "v1/metrics/loggers.py").read_text()
    for name in asked("vllm:"):
        assert f'"{name.removesuffix("_total")}"' in source, name
