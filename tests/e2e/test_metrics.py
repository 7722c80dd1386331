"""A real Prometheus scrapes a started server; the log is JSON where that was asked for; the example runs.

`make deps-debian` installs prometheus.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import ENVIRONMENT, HERE, curl, data_of, run_program, until

STREAMS = 3
TOKENS = 8

_open = build_opener(ProxyHandler({})).open


class Prometheus:
    """A started Prometheus that scrapes one server.

    Args:
        folder: an empty folder.
        target: host and port of the server.
    """

    def __init__(self, folder: Path, target: str) -> None:
        program = shutil.which("prometheus")
        assert program, "this test wants prometheus; on Debian: make deps-debian"
        scrape = (
            f"scrape_configs:\n- job_name: it\n  scrape_interval: 200ms\n  static_configs:\n  - targets: ['{target}']\n"
        )
        (folder / "prometheus.yml").write_text(scrape)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 "--web.listen-address=127.0.0.1:0"],
                env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._url = until(self._listening, "prometheus to listen", 60)
        except BaseException:
            self.stop()
            raise

    def _listening(self) -> str | None:
        assert self.process.poll() is None, self._log.read_text()
        for line in self._log.read_text().splitlines():
            _, address, rest = line.partition("address=127.0.0.1:")
            if address and "istening on" in line:  # a line before it says 127.0.0.1:0
                return "http://127.0.0.1:" + rest.split()[0].strip('"')
        return None

    def ask(self, query: str) -> dict[tuple[str, str], float]:
        """Evaluate a query; by dialect and end."""
        try:
            with _open(f"{self._url}/api/v1/query?query={quote(query)}", timeout=10) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except URLError:
            return {}
        return {
            (one["metric"].get("dialect", ""), one["metric"].get("end", "")): float(one["value"][1]) for one in found
        }

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def scraped(serve: Serve, tmp_path: Path) -> Iterator[tuple[str, Prometheus]]:
    """A server's URL, and the Prometheus that scrapes it."""
    url = serve("mock").url
    prometheus = Prometheus(tmp_path, url.removeprefix("http://"))
    yield url, prometheus
    prometheus.stop()


def test_prometheus_scrapes_what_clients_got(scraped: tuple[str, Prometheus]) -> None:
    url, prometheus = scraped
    tokens = 0
    for _ in range(STREAMS):
        events = data_of(curl(f"{url}/chat?prompt=hi&max_tokens={TOKENS}"))
        tokens += sum(bool(json.loads(event)["token"]) for event in events if event.startswith("{"))
    assert tokens == STREAMS * TOKENS
    finished = 'tokenwire_streams_total{end="finished"}'
    until(lambda: prometheus.ask(finished) == {("plain", "finished"): STREAMS}, "the streams to be scraped", 60)
    until(lambda: prometheus.ask("tokenwire_tokens_total") == {("plain", ""): tokens}, "the tokens to be scraped", 60)
    assert prometheus.ask("tokenwire_inter_token_latency_seconds_count") == {("plain", ""): tokens - STREAMS}
    assert prometheus.ask("gen_ai_server_time_to_first_token_seconds_count") == {("plain", ""): STREAMS}
    (quantile,) = prometheus.ask("histogram_quantile(0.5, tokenwire_time_to_first_token_seconds_bucket)").values()
    assert 0 < quantile < 60


def test_the_log_may_be_json(serve: Serve) -> None:
    server = serve("mock", "--log-format", "json")
    curl(f"{server.url}/chat?prompt=hi&max_tokens=4")
    (line,) = until(lambda: server.logged('"tokenwire.access"'), "a line of the access log")
    facts = json.loads(line)
    assert (facts["path"], facts["status"], facts["end"], facts["tokens"]) == ("/chat", 200, "finished", 4)
    assert {"ttft_ms", "tpot_ms", "gap_p99_ms", "stream", "bytes", "dialect", "model"} <= facts.keys()


def test_a_server_may_count_nothing(serve: Serve) -> None:
    server = serve("mock", "--no-accounting")
    assert data_of(curl(f"{server.url}/chat?prompt=hi&max_tokens=4"))[-1] == "[DONE]"
    assert json.loads(curl(f"{server.url}/metrics"))["error"]["code"] == "not_found"


def test_the_example_says_what_each_tool_would() -> None:
    said = run_program([sys.executable, str(HERE.parents[1] / "examples/latency_of_any_iterator.py")])
    lines = said.splitlines()
    assert lines[0].startswith("Once upon a time")
    assert {"tokenwire", "vllm", "aiperf", "guidellm", "mlperf"} <= {line.split()[0] for line in lines[1:]}
    assert all(line.endswith(" ms") and float(line.split()[-2]) >= 0 for line in lines[1:])
