"""`carpool top`: a running server's metrics, read from a server of the standard library that serves a recorded page."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from carpool import CarpoolError
from carpool.cli import top
from carpool.cli.commands import app
from carpool.cli.scrape import metrics_url, scrape
from carpool.hosts.engine.metrics import COUNTERS

RECORDED = (Path(__file__).parent / "recorded_metrics.txt").read_text()  # of vLLM with the reference model


class Server(HTTPServer):
    """Serves `pages` one after another, the last one for good; None is an answer that failed."""

    pages: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        pages = self.server.pages
        page = (pages.pop(0) if len(pages) > 1 else pages[0]) if self.path == "/metrics" else None
        self.send_response(404 if page is None else 200)
        self.end_headers()
        self.wfile.write((page or "").encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.pages = [RECORDED]
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["top", *arguments])


def value(name: str, page: str = RECORDED) -> float:
    """A metric of the page, read without any parser."""
    return sum(float(found) for found in re.findall(rf"^carpool_{name}(?:{{[^}}]*}})? (\S+)$", page, re.M))


def changed(page: str, name: str, by: float) -> str:
    """The page with more of a total."""
    return re.sub(rf"^(carpool_{name}(?:{{[^}}]*}})?) \S+$", rf"\1 {value(name, page) + by}", page, flags=re.M)


def test_what_it_reads_is_what_the_plugin_writes() -> None:
    names = {name.removeprefix("carpool_") for name, _ in COUNTERS.values()} | {"refusals"}
    assert {f"carpool_{name}_total" for name in names} <= set(re.findall(r"^\w+", RECORDED, re.M))
    asked = {name for _, _, *pair, _ in top.RATIOS for name in pair} | {name for name, _ in top.TOTALS}
    assert asked <= names
    assert all(value(f"{name}_total") >= 0 and f"carpool_{name}_total" in RECORDED for name in asked)


def test_one_look_as_json(server: Server) -> None:
    done = invoke(server.url, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["enabled"] is True
    assert found["experts_natively"] == value("experts_natural_total") / value("layer_steps_total")
    assert found["experts_read"] == value("experts_read_total") / value("layer_steps_total")
    assert found["rows_changed"] == value("rows_changed_total") / value("rows_total")
    assert found["displaced_mass"] == value("displaced_mass_total") / value("rows_total")
    assert found["floor_overflow"] == 0
    assert found["refusals"] == value("refusals_total") == 12
    assert 0 < found["experts_share"] < 1


def test_one_look_as_a_table(server: Server) -> None:
    done = invoke(server.url.removeprefix("http://"), "--once")
    assert done.exit_code == 0, done.output
    share = value("experts_read_total") / value("experts_natural_total")
    assert f"sharing  {server.url}/metrics" in done.output
    assert f"{share:.1%}" in done.output
    assert f"{share:.0%} of the experts" in done.output
    assert re.search(r"changes refused +– +12\n", done.output)
    assert "\x1b" not in done.output


def text(found: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


def test_now_is_what_happened_since_the_last_look(server: Server) -> None:
    later = RECORDED
    for name, more in (("layer_steps", 10), ("experts_natural", 400), ("experts_read", 100), ("rows", 80),
                       ("rows_changed", 60), ("displaced_mass", 8), ("refusals", 2)):  # fmt: skip
        later = changed(later, f"{name}_total", more)
    server.pages = [RECORDED, later]
    first, second = (scrape(metrics_url(server.url)) for _ in range(2))
    shown = text(top.view("page", second, second.since(first)))
    assert re.search(r"experts a layer and step, read +10\.0 +\d", shown)
    assert re.search(r"experts read, of natively +25\.0% +\d", shown)
    assert re.search(r"rows changed +75\.0% +\d", shown)
    assert re.search(r"displaced mass of a row +10\.0% +\d", shown)
    assert re.search(r"changes refused +2 +14\n", shown)
    assert "25% of the experts" in shown
    assert first.since(second) is None, "a server that started anew"


def test_a_server_in_which_nothing_ran_says_so(server: Server) -> None:
    server.pages = [re.sub(r"^(carpool_\w+_total(?:{[^}]*})?) \S+$", r"\1 0.0", RECORDED, flags=re.M)]
    assert "no policy has run yet" in invoke(server.url, "--once").output.replace("\n", " ")
    assert json.loads(invoke(server.url, "--json").output)["experts_read"] is None
    for name, count in (("steps", 7), ("steps_alone", 5)):
        server.pages = [changed(server.pages[0] or "", f"{name}_total", count)]
    said = invoke(server.url, "--once").output.replace("\n", " ")
    assert "no policy has run yet: of 7 steps 5 had every row alone, the others prompts" in said


def test_switched_off(server: Server) -> None:
    server.pages = [re.sub(r"^(carpool_enabled(?:{[^}]*})?) \S+$", r"\1 0.0", RECORDED, flags=re.M)]
    assert "switched off" in invoke(server.url, "--once").output


def test_engines_of_one_server_are_added(server: Server) -> None:
    ours = [line for line in RECORDED.splitlines() if line.startswith("carpool_")]
    bare = [re.sub(r"{[^}]*}", "", line) for line in ours]
    server.pages = ["\n".join(f"{name}{{engine=\"{engine}\"}} {number}" for engine in range(2)
                              for name, number in (line.split() for line in bare)) + "\n"]  # fmt: skip
    found = scrape(metrics_url(server.url))
    assert found.total("rows") == 2 * value("rows_total")


def test_it_watches_through_a_restart_until_it_is_told_to_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pages = [RECORDED, None, changed(RECORDED, "refusals_total", 4)]
    looks = iter((None, None, KeyboardInterrupt))

    def sleep(_: float) -> None:
        if (error := next(looks)) is not None:
            raise error

    monkeypatch.setattr(top.time, "sleep", sleep)
    done = invoke(server.url)
    assert done.exit_code == 0, done.output
    assert re.search(r"changes refused +4 +16$", done.output.rstrip(), re.M)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("vllm:num_requests_running 1.0\n", "has no metrics of Carpool; start the server with the key 'carpool'"),
        ("", "has no metrics of Carpool"),
        ("<html>hello</html>\n", "is no page of Prometheus metrics"),
        (None, "answers 404 (Not Found)"),
    ],
)
def test_what_is_no_server_of_ours_is_one_sentence(server: Server, page: str | None, said: str) -> None:
    server.pages = [page]
    done = invoke(server.url, "--once")
    assert done.exit_code == 2
    assert said in done.output
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["", "http://", "ftp://host/metrics", "http://host:port", "host:99999", "http://host:0"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(CarpoolError, match="is no address of a server; give one such as"):
        metrics_url(url)


def test_nobody_answers() -> None:
    with Server(("127.0.0.1", 0), Handler) as made:
        url = made.url
    done = invoke(url)
    assert done.exit_code == 2
    assert f"no answer from {url}/metrics (" in done.output


def test_addresses() -> None:
    for given in ("localhost:8000", "http://localhost:8000", "http://localhost:8000/", "localhost:8000/metrics"):
        assert metrics_url(given) == "http://localhost:8000/metrics"
    assert metrics_url("https://one.example/engine/metrics") == "https://one.example/engine/metrics"


def test_the_interval_is_checked(server: Server) -> None:
    done = invoke(server.url, "--interval", "0")
    assert done.exit_code == 2
    assert "--interval" in done.output
