"""A real browser: the page, EventSource, dropped connections, and pages of other origins."""
# pyright: basic, reportMissingImports=false
# selenium is in the environment of these tests, and not where the type checkers look.

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
from selenium import webdriver  # type: ignore[import-not-found, unused-ignore]  # see above
from tests.e2e.conftest import Serve
from tests.e2e.harness import DONE, ENVIRONMENT, Reader, Relay, Server, curl, notes, text_of, until

Chrome: TypeAlias = Any

_FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-features=BackForwardCache",  # it keeps a page that was left, with its connections
    "--window-size=900,640",
    # Names that are not the loopback's, on the loopback: foreign sites.
    "--host-resolver-rules=MAP *.test 127.0.0.1",
)
_WHOLE: Final = "before-0 before-1 before-2 behind-0 behind-1 "

_FOLLOW: Final = """
const [url] = arguments;
const seen = window.seen = {text: "", opened: 0, errors: 0, done: false, failed: null};
const source = window.source = new EventSource(url);
source.onopen = () => { seen.opened += 1; };
source.onerror = () => { seen.errors += 1; };
source.onmessage = (event) => {
  if (event.data === "[DONE]") { source.close(); seen.done = true; return; }
  const said = JSON.parse(event.data);
  seen.text += said.token;
  if (said.error) seen.failed = said.error;
};
"""
"""What the README tells a page to do."""

_LOAD_IMAGE: Final = """
const [url] = arguments;
const image = new Image();
window.image = null;
image.onload = () => { window.image = "loaded"; };
image.onerror = () => { window.image = "refused"; };
image.src = url;
"""

_FETCH: Final = """
const [url, options, finished] = arguments;
fetch(url, options).then(
  async (response) => finished({status: response.status, body: await response.text()}),
  () => finished({status: null, body: null}),
);
"""


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Headless Chromium, new and empty."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, "the browser tests want chromium; on Debian: make deps-debian"
    assert driver, "the browser tests want chromedriver; on Debian: make deps-debian"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(driver, env=ENVIRONMENT)
    with webdriver.Chrome(options=options, service=service) as chrome:
        chrome.set_script_timeout(20)
        yield chrome


@contextmanager
def foreign_pages() -> Generator[int, None, None]:
    """Serve an empty page on another port of the loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as pages:
        thread = threading.Thread(target=pages.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield pages.server_port
        finally:
            pages.shutdown()
            thread.join()


def _seen(chrome: Chrome) -> dict[str, Any]:
    seen: dict[str, Any] = chrome.execute_script("return {...window.seen, state: window.source.readyState}")
    return seen


def _follow(chrome: Chrome, url: str, prompt: str) -> None:
    chrome.execute_script(_FOLLOW, f"{url}/chat?prompt={prompt}")


def _until_done(chrome: Chrome) -> dict[str, Any]:
    return until(lambda: seen if (seen := _seen(chrome))["done"] else None, f"{DONE} in the page")


def test_the_page_shows_the_stream(chrome: Chrome, mock: Server) -> None:
    chrome.get_log("browser")  # what other tests' pages have said
    chrome.get(f"{mock.url}/")
    prompt = chrome.find_element("name", "prompt").get_property("value")
    chrome.find_element("css selector", "button").click()
    figures = chrome.find_element("id", "figures")
    until(lambda: "done" in figures.text, "the page's 'done'")
    shown = chrome.find_element("tag name", "output").get_property("textContent")
    assert shown == text_of(curl(f"{mock.url}/chat", "-G", "--data-urlencode", f"prompt={prompt}"))
    assert "first token after" in figures.text
    assert [entry for entry in chrome.get_log("browser") if "favicon" not in entry["message"]] == []


def test_the_page_tells_an_error_from_the_text(chrome: Chrome, shared: Serve) -> None:
    chrome.get(f"{shared('fails_midway').url}/")
    chrome.find_element("css selector", "button").click()
    figures = chrome.find_element("id", "figures")
    until(lambda: "failed" in figures.text, "the page's 'failed'")
    assert chrome.find_element("tag name", "output").get_property("textContent") == "one two "
    assert "SecretError" in chrome.find_element("id", "failure").text
    assert "hunter2" not in chrome.page_source


def test_the_page_says_when_the_server_refused(chrome: Chrome, serve: Serve, room: Path) -> None:
    server = serve("gated", "--max-streams", "1", "--max-queue", "0")
    with Reader(server, {"prompt": str(room)}) as busy:
        busy.read_until(b"before-0")
        chrome.get(f"{server.url}/")
        chrome.find_element("css selector", "button").click()
        figures = chrome.find_element("id", "figures")
        until(lambda: "failed" in figures.text, "the page's 'failed'")
        assert "refused" in chrome.find_element("id", "failure").text
        (room / "go").touch()
        busy.read_until(DONE.encode())


def test_event_source_reads_tokens_and_closes_on_done(chrome: Chrome, mock: Server) -> None:
    chrome.get(f"{mock.url}/healthz")
    _follow(chrome, "", "Hello")
    seen = _until_done(chrome)
    assert seen["text"] == text_of(curl(f"{mock.url}/chat?prompt=Hello"))
    assert (seen["opened"], seen["errors"], seen["failed"]) == (1, 0, None)


def test_event_source_gets_tokens_before_the_end(chrome: Chrome, shared: Serve, room: Path, loop: str) -> None:
    server = shared("gated", loop=loop)
    chrome.get(f"{server.url}/healthz")
    _follow(chrome, "", str(room))
    until(lambda: "before-2" in _seen(chrome)["text"], "the tokens before the gate")
    assert not _seen(chrome)["done"]
    (room / "go").touch()
    assert _until_done(chrome)["text"] == _WHOLE


def test_event_source_is_told_of_an_error_and_closes(chrome: Chrome, shared: Serve, loop: str) -> None:
    server = shared("fails_midway", loop=loop)
    chrome.get(f"{server.url}/healthz")
    _follow(chrome, "", "Hello")
    seen = _until_done(chrome)
    assert seen["text"] == "one two "
    assert seen["failed"]["type"] == "server_error"
    assert seen["opened"] == 1


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
@pytest.mark.parametrize("backend", ["gated", "async_gated"])
def test_a_dropped_connection_never_runs_the_prompt_again(
    chrome: Chrome, shared: Serve, room: Path, loop: str, backend: str, reset: bool
) -> None:
    server = shared(backend, loop=loop)
    with Relay(server) as relay:
        chrome.get(f"{relay.url}/healthz")
        _follow(chrome, "", str(room))
        until(lambda: "before-2" in _seen(chrome)["text"], "the tokens before the gate")
        relay.cut(reset=reset)
        until(lambda: _seen(chrome)["state"] == 2, "the EventSource's end")
        first, second = relay.heads("/chat")
        seen = _seen(chrome)
        assert "last-event-id: " not in first.lower()
        assert "last-event-id: " in second.lower()
        assert (seen["text"], seen["opened"], seen["done"]) == ("before-0 before-1 before-2 ", 1, False)
        (room / "go").touch()
        until(lambda: notes(room)[-1] == "closed", "the end of the generator")
        chrome.get("about:blank")
    assert notes(room) == ["run", "closed"]


def test_a_connection_dropped_before_the_first_token_does_not_either(chrome: Chrome, serve: Serve, room: Path) -> None:
    server = serve("silent", "--heartbeat", "50ms")
    with Relay(server) as relay:
        chrome.get(f"{relay.url}/healthz")
        _follow(chrome, "", str(room))
        until(lambda: notes(room) == ["run"] and _seen(chrome)["opened"], "the head of the answer")
        relay.cut(reset=False)
        until(lambda: _seen(chrome)["state"] == 2 or len(notes(room)) > 1, "the EventSource's end, or a second run")
        chrome.execute_script("window.source.close()")
    (room / "go").touch()
    assert notes(room) == ["run"]


@pytest.mark.parametrize("how", ["window.source.close()", "location.assign('about:blank')"], ids=["close", "leave"])
def test_closing_or_leaving_stops_the_backend(chrome: Chrome, shared: Serve, room: Path, loop: str, how: str) -> None:
    server = shared("endless", loop=loop)
    chrome.get(f"{server.url}/healthz")
    _follow(chrome, "", str(room))
    until(lambda: "more" in _seen(chrome)["text"], "a token")
    chrome.execute_script(how)
    until(lambda: notes(room) == ["run", "closed"], "the end of the generator")


def test_a_local_page_of_another_port_may_ask(chrome: Chrome, mock: Server) -> None:
    with foreign_pages() as port:
        chrome.get(f"http://127.0.0.1:{port}/")
        _follow(chrome, mock.url, "Hello")
        assert _until_done(chrome)["text"] == text_of(curl(f"{mock.url}/chat?prompt=Hello"))
        options = {"method": "POST", "headers": {"content-type": "application/json"}, "body": '{"prompt":"Hello"}'}
        answer = chrome.execute_async_script(_FETCH, f"{mock.url}/chat", options)
        assert answer["status"] == 200
        assert text_of(answer["body"]) == _seen(chrome)["text"]


@pytest.mark.parametrize("host", ["evil.test", "localhost"])
def test_an_image_of_another_site_generates_nothing(chrome: Chrome, shared: Serve, room: Path, host: str) -> None:
    server = shared("endless")
    refused = len(server.logged("GET /chat 403 refused"))
    with foreign_pages() as port:
        chrome.get(f"http://{host}:{port}/")
        chrome.execute_script(_LOAD_IMAGE, f"{server.url}/chat?prompt={room}")
        assert until(lambda: chrome.execute_script("return window.image"), "the image's fate") == "refused"
    until(lambda: len(server.logged("GET /chat 403 refused")) == refused + 1, "the log's line")
    assert notes(room) == []


def test_a_script_of_another_site_generates_nothing(chrome: Chrome, shared: Serve, room: Path) -> None:
    server = shared("endless")
    body = json.dumps({"prompt": str(room)})
    simple: dict[str, Any] = {"method": "POST", "mode": "no-cors", "body": body}
    asked: dict[str, Any] = {"method": "POST", "headers": {"content-type": "application/json"}, "body": body}
    with foreign_pages() as port:
        chrome.get(f"http://evil.test:{port}/")
        chrome.execute_async_script(_FETCH, f"{server.url}/chat", simple)
        assert chrome.execute_async_script(_FETCH, f"{server.url}/chat", asked)["status"] is None
        _follow(chrome, server.url, str(room))
        until(lambda: _seen(chrome)["state"] == 2, "the EventSource's end")
    assert notes(room) == []


def test_an_allowed_site_may_ask(chrome: Chrome, serve: Serve) -> None:
    with foreign_pages() as port:
        server = serve("words", "--allow-origin", f"http://friend.test:{port}")
        chrome.get(f"http://friend.test:{port}/")
        _follow(chrome, server.url, "two owls")
        assert _until_done(chrome)["text"] == "two owls "


def test_a_foreign_name_for_this_server_is_refused(chrome: Chrome, shared: Serve, room: Path) -> None:
    server = shared("endless")
    chrome.get(f"http://evil.test:{server.port}/")
    assert "host_not_allowed" in chrome.page_source
    _follow(chrome, "", str(room))
    until(lambda: _seen(chrome)["state"] == 2, "the EventSource's end")
    assert notes(room) == []
