"""WebSocket by clients that are not ours, to the bundled server and through ASGI under real servers."""
# pyright: basic, reportMissingImports=false
# mypy: disable-error-code="import-not-found, unused-ignore"
# websockets and selenium are in the environment of these tests, and not where the type checkers look.

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlsplit

import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import DONE, HERE, notes, until
from tests.e2e.test_asgi import SERVERS, Running, running
from tests.e2e.test_browser import Chrome, chrome, foreign_pages
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)

__all__ = ["chrome"]

OBJECTS: Final = "tokenwire.plain.v1"
CANCEL: Final = '{"cancel":true}'
PATIENCE_S: Final = 20


# ------------------------------------------------------------------------------------------------------------- clients


class RefusedError(Exception):
    """The handshake was answered by HTTP."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Client(Protocol):
    """One WebSocket."""

    subprotocol: str | None

    def say(self, text: str) -> None:
        """Send a message."""
        ...

    def hear(self) -> str:
        """Wait for a message.

        Raises:
            EOFError: the server has closed; the code and the reason are its arguments.
        """
        ...

    def close(self) -> None:
        """Close, and wait for the end."""
        ...

    def vanish(self) -> None:
        """Reset the connection."""
        ...

    def drop(self) -> None:
        """Let go of the socket, whatever became of it. Idempotent."""
        ...


class ByWebsockets:
    """The client of websockets."""

    def __init__(self, url: str, subprotocols: Sequence[str] = (), origin: str | None = None) -> None:
        asked: Any = {"subprotocols": list(subprotocols) or None, "origin": origin, "proxy": None, "legacy": True}
        try:
            self._socket: Any = connect(f"ws{url.removeprefix('http')}/ws/chat", open_timeout=PATIENCE_S, **asked)
        except InvalidStatus as error:
            raise RefusedError(error.response.status_code) from None
        self.subprotocol = self._socket.subprotocol

    def say(self, text: str) -> None:
        self._socket.send(text)

    def hear(self) -> str:
        try:
            message = self._socket.recv(PATIENCE_S)
        except ConnectionClosed as closed:
            raise EOFError(*((closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else ())) from None
        assert isinstance(message, str)
        return message

    def close(self) -> None:
        self._socket.close()

    def vanish(self) -> None:
        _reset(self._socket.socket)

    def drop(self) -> None:
        self._socket.close()


class ByWsproto:
    """wsproto on a socket."""

    def __init__(self, url: str, subprotocols: Sequence[str] = (), origin: str | None = None) -> None:
        netloc = urlsplit(url).netloc
        host, _, port = netloc.partition(":")
        self._sock = socket.create_connection((host, int(port)), PATIENCE_S)
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._heard: list[str] = []
        self._text = ""
        self._closed: tuple[Any, ...] | None = None
        headers = [(b"origin", origin.encode())] if origin else []
        asked = Request(host=netloc, target="/ws/chat", subprotocols=list(subprotocols), extra_headers=headers)
        self._sock.sendall(self._protocol.send(asked))
        self._accepted = False
        self.subprotocol: str | None = None
        while not self._accepted:
            self._receive()

    def say(self, text: str) -> None:
        self._sock.sendall(self._protocol.send(TextMessage(text)))

    def hear(self) -> str:
        while not self._heard:
            if self._closed is not None:
                raise EOFError(*self._closed)
            self._receive()
        return self._heard.pop(0)

    def close(self) -> None:
        self._sock.sendall(self._protocol.send(CloseConnection(1000)))
        while self._closed is None:
            self._receive()
        self._sock.close()

    def vanish(self) -> None:
        _reset(self._sock)

    def drop(self) -> None:
        self._sock.close()

    def _receive(self) -> None:
        data = self._sock.recv(65_536)
        self._protocol.receive_data(data or None)
        for event in self._protocol.events():
            match event:
                case AcceptConnection():
                    self._accepted = True
                    self.subprotocol = event.subprotocol
                case RejectConnection():
                    self._sock.close()
                    raise RefusedError(event.status_code)
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        self._heard.append(self._text)
                        self._text = ""
                case Ping():
                    self._sock.sendall(self._protocol.send(event.response()))
                case CloseConnection():
                    self._closed = (event.code, event.reason)
                    if self._protocol.state.name == "REMOTE_CLOSING":
                        self._sock.sendall(self._protocol.send(event.response()))
                case _:
                    pass


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.shutdown(socket.SHUT_RD)
    sock.close()


CLIENTS: Final[dict[str, Callable[..., Client]]] = {"websockets": ByWebsockets, "wsproto": ByWsproto}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """Open a WebSocket by each client in turn; it is closed after the test."""
    name: str = request.param
    opened: list[Client] = []

    def open_one(url: str, **options: Any) -> Client:
        opened.append(CLIENTS[name](url, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.drop()


@pytest.fixture
def browser(chrome: Chrome) -> Iterator[Chrome]:
    """Chromium, which leaves its page after the test, and so closes what that has opened."""
    yield chrome
    chrome.get("about:blank")


def answer(client: Client) -> list[str]:
    """Hear an answer to its end."""
    messages = [client.hear()]
    while messages[-1] != DONE:
        messages.append(client.hear())
    return messages


def prompt(text: object) -> str:
    return json.dumps({"prompt": str(text)})


# ------------------------------------------------------------------------------------------------------------- servers


class Place(NamedTuple):
    """Where to ask: what echoes words, and what goes on until somebody stops it."""

    echo: str
    endless: str


def _uvicorn(kind: str, loop: str) -> Callable[[str, int], Sequence[str]]:
    flags = ("--ws", kind, "--loop", loop, "--log-level", "warning")
    return lambda app, port: ("-m", "uvicorn", *flags, "--port", str(port), app)


ASGI: Final[dict[str, Callable[[str, int], Sequence[str]]]] = {
    "uvicorn-websockets": _uvicorn("websockets", "asyncio"),
    "uvicorn-websockets-sansio": _uvicorn("websockets-sansio", "uvloop"),
    "uvicorn-wsproto": _uvicorn("wsproto", "asyncio"),
    **{name: SERVERS[name] for name in ("hypercorn-asyncio", "hypercorn-trio", "granian")},
}
BUNDLED: Final = ("asyncio", "uvloop", "trio")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Running]]:
    """Start the application under an ASGI server, or find it started."""
    found: dict[str, Running] = {}
    with ExitStack() as stack:

        def start(name: str) -> Running:
            if name not in found:
                folder = tmp_path_factory.mktemp("websocket")
                found[name] = stack.enter_context(
                    running(folder, lambda port: ASGI[name]("asgi_apps:bare", port), HERE)
                )
            return found[name]

        yield start


@pytest.fixture(params=[*BUNDLED, *ASGI])
def place(request: pytest.FixtureRequest, shared: Serve, programs: Callable[[str], Running]) -> Place:
    """Each server in turn."""
    name: str = request.param
    if name in BUNDLED:
        return Place(shared("words", loop=name).url, shared("async_endless", loop=name).url)
    url = programs(name).url
    return Place(url, url)


# --------------------------------------------------------------------------------------------------------------- tests


def test_tokens_as_text(place: Place, client: Callable[..., Client]) -> None:
    socket = client(place.echo)
    assert socket.subprotocol is None
    for words in ("Two owls é😀 \u2028", f"{DONE} and more", "x" * 70_000):
        socket.say(prompt(words))
    for words in ("Two owls é😀 ", f"{DONE} and more ", "x" * 70_000 + " "):
        *said, last = answer(socket)
        assert "".join(said) == words
        assert last == DONE
    socket.close()


def test_tokens_as_objects(place: Place, client: Callable[..., Client]) -> None:
    socket = client(place.echo, subprotocols=("chat", OBJECTS))
    assert socket.subprotocol == OBJECTS
    socket.say(prompt("Two owls"))
    *said, finish, _ = answer(socket)
    assert "".join(json.loads(message)["token"] for message in said) == "Two owls "
    assert json.loads(finish)["finish_reason"] == "stop"
    socket.say("{}")
    failure, _ = answer(socket)
    assert json.loads(failure)["error"]["type"] == "invalid_request_error"
    socket.say(prompt("again"))
    assert json.loads(answer(socket)[0]) == {"token": "again "}
    socket.close()


def test_a_bad_prompt_as_text(place: Place, client: Callable[..., Client]) -> None:
    socket = client(place.echo)
    socket.say("{}")
    with pytest.raises(EOFError) as closed:
        socket.hear()
    code, reason = closed.value.args
    assert code == 1011
    assert reason.startswith("invalid_request_error: ")


def test_cancelling(place: Place, client: Callable[..., Client], room: Path) -> None:
    socket = client(place.endless, subprotocols=(OBJECTS,))
    socket.say(prompt(room))
    assert json.loads(socket.hear())["token"]
    socket.say(CANCEL)
    *_, failure, _ = answer(socket)
    assert json.loads(failure)["error"]["code"] == "cancelled"
    until(lambda: notes(room) == ["run", "closed"], "the end of the generator")
    socket.close()


@pytest.mark.parametrize("how", ["close", "vanish"])
def test_leaving_stops_the_backend(place: Place, client: Callable[..., Client], room: Path, how: str) -> None:
    socket = client(place.endless)
    socket.say(prompt(room))
    assert socket.hear()
    assert notes(room) == ["run"]
    getattr(socket, how)()
    until(lambda: notes(room) == ["run", "closed"], "the end of the generator")


def test_a_foreign_origin(place: Place, client: Callable[..., Client]) -> None:
    with pytest.raises(RefusedError) as refused:
        client(place.echo, origin="http://evil.test")
    assert refused.value.status == 403
    socket = client(place.echo, origin="http://localhost:3000")
    socket.say(prompt("friend"))
    assert answer(socket)[-1] == DONE
    socket.close()


# ------------------------------------------------------------------------------------------------------------- Chromium

_OPEN: Final = """
const [url, protocols, messages] = arguments;
const seen = window.seen = {texts: [], protocol: null, closed: null};
const socket = window.socket = new WebSocket(url, protocols);
socket.onopen = () => { seen.protocol = socket.protocol; messages.forEach((message) => socket.send(message)); };
socket.onmessage = (event) => { seen.texts.push(event.data); };
socket.onclose = (event) => { seen.closed = [event.code, event.reason, event.wasClean]; };
"""


def _open(chrome: Chrome, url: str, *messages: str, protocols: Sequence[str] = ()) -> None:
    chrome.execute_script(_OPEN, f"ws{url.removeprefix('http')}/ws/chat", list(protocols), list(messages))


def _seen(chrome: Chrome) -> Any:
    return chrome.execute_script("return window.seen")


def test_a_browser_reads_text_and_objects(browser: Chrome, place: Place) -> None:
    browser.get(f"{place.echo}/healthz")
    _open(browser, place.echo, prompt("two owls"), prompt("more"))
    until(lambda: _seen(browser)["texts"].count(DONE) == 2, "both answers")
    assert "".join(_seen(browser)["texts"]) == f"two owls {DONE}more {DONE}"
    browser.execute_script("window.socket.close(1000)")
    until(lambda: _seen(browser)["closed"], "the close")
    assert _seen(browser)["closed"] == [1000, "", True]
    _open(browser, place.echo, prompt("owl"), protocols=[OBJECTS])
    until(lambda: DONE in _seen(browser)["texts"], "the answer")
    assert _seen(browser)["protocol"] == OBJECTS
    assert json.loads(_seen(browser)["texts"][0]) == {"token": "owl "}


def test_a_browser_cancels(browser: Chrome, place: Place, room: Path) -> None:
    browser.get(f"{place.endless}/healthz")
    _open(browser, place.endless, prompt(room), protocols=[OBJECTS])
    until(lambda: _seen(browser)["texts"], "a token")
    browser.execute_script("window.socket.send(arguments[0])", CANCEL)
    until(lambda: DONE in _seen(browser)["texts"], "the end of the answer")
    assert json.loads(_seen(browser)["texts"][-2])["error"]["code"] == "cancelled"
    until(lambda: notes(room) == ["run", "closed"], "the end of the generator")


@pytest.mark.parametrize("how", ["window.socket.close()", "location.assign('about:blank')"], ids=["close", "leave"])
def test_a_browser_that_closes_or_leaves(browser: Chrome, place: Place, room: Path, how: str) -> None:
    browser.get(f"{place.endless}/healthz")
    _open(browser, place.endless, prompt(room))
    until(lambda: _seen(browser)["texts"], "a token")
    browser.execute_script(how)
    until(lambda: notes(room) == ["run", "closed"], "the end of the generator")


def test_a_page_of_another_site_opens_none(browser: Chrome, place: Place, room: Path) -> None:
    with foreign_pages() as port:
        browser.get(f"http://evil.test:{port}/")
        _open(browser, place.endless, prompt(room))
        until(lambda: _seen(browser)["closed"], "the refusal")
        assert _seen(browser)["closed"][0] == 1006
        browser.get(f"http://127.0.0.1:{port}/")
        _open(browser, place.echo, prompt("neighbour"))
        until(lambda: DONE in _seen(browser)["texts"], "the answer")
    assert notes(room) == []
