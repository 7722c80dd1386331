"""Which models another server has: GET /models of an OpenAI-compatible server, asked without holding anybody up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from tokenwire.core.client import ResponseReader, ResponseReceived
from tokenwire.core.contracts import ModelCard
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.http import BodyEnded, BodyReceived

if TYPE_CHECKING:
    from .pool import Pool

__all__ = ["MAX_MODELS", "MAX_MODELS_BYTES", "ModelsInquiry", "read_models"]

MAX_MODELS_BYTES: Final = 4 * 1024 * 1024
"""The longest list that is read: a router with 500 models sends 1 MiB of descriptions."""

MAX_MODELS: Final = 10_000
"""The most models that are taken from it."""

_MAX_NAME: Final = 256


class ModelsInquiry:
    """One question, on a connection of its own from the pool; a `tokenwire.backends.base.Peer`.

    Args:
        pool: where the connection comes from.
        request: the whole request.
        answer: takes the models, or in words why there are none; called once, unless the inquiry is closed first.
    """

    __slots__ = ("_answer", "_body", "_connection", "_reader", "_request", "_status")

    def __init__(self, pool: Pool, request: bytes, answer: Callable[[list[ModelCard] | str], None]) -> None:
        self._request = request
        self._answer: Callable[[list[ModelCard] | str], None] | None = answer
        self._reader = ResponseReader("GET")
        self._body = bytearray()
        self._status = 0
        self._connection = pool.acquire(self)

    def begin(self, now: int) -> None:
        """Ask at once where the connection stands already."""
        if self._connection.ready:
            self.connected(now)

    def close(self) -> None:
        """Give up, whatever has come; the answer is not called any more. Idempotent."""
        self._answer = None
        self._connection.close()

    def connected(self, now: int) -> None:
        """The connection stands: ask; see `Peer`."""
        del now
        self._connection.write(self._request)

    def receive_data(self, data: bytes, now: int) -> None:
        """Bytes came; see `Peer`."""
        try:
            events = self._reader.receive_data(data)
            self._reader.check()
        except RemoteProtocolError as error:
            self._end(f"its list of models is malformed: {error}")
            return
        for event in events:
            match event:
                case ResponseReceived():
                    self._status = event.status
                case BodyReceived():
                    self._body += event.data
                case BodyEnded():
                    self._end_body(now)
                    return
        if len(self._body) > MAX_MODELS_BYTES:
            self._end(f"its list of models is longer than {MAX_MODELS_BYTES} bytes")

    def set_blocked(self, blocked: bool, now: int) -> None:
        """Nothing: there is no more to write; see `Peer`."""

    def receive_eof(self, now: int) -> None:
        """The other side hung up; see `Peer`."""
        del now
        try:
            ended = bool(self._reader.receive_eof())
        except RemoteProtocolError as error:
            self._end(str(error))
        else:
            self._end(self._models() if ended else "it closed the connection")

    def failed(self, reason: str, now: int) -> None:
        """The connection could not be made, or broke; see `Peer`."""
        del now
        self._end(reason)

    def _end_body(self, now: int) -> None:
        models = self._models()
        answer, self._answer = self._answer, None
        if self._reader.reusable:
            self._connection.release(now)
        else:
            self._connection.close()
        if answer is not None:
            answer(models)

    def _end(self, outcome: list[ModelCard] | str) -> None:
        answer = self._answer
        self.close()
        if answer is not None:
            answer(outcome)

    def _models(self) -> list[ModelCard] | str:
        if self._status != 200:
            return f"it answers {self._status} when it is asked for its models"
        return read_models(bytes(self._body))


def read_models(body: bytes) -> list[ModelCard] | str:
    """Read a list of models, whatever else is in it.

    Returns:
        The models, at least one; or in words why there are none.
    """
    try:
        value: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "its list of models is not JSON"
    entries = _object(value).get("data")
    found: dict[str, ModelCard] = {}
    for entry in cast("list[object]", entries)[:MAX_MODELS] if isinstance(entries, list) else ():
        members = _object(entry)
        name, created, owner = members.get("id"), members.get("created"), members.get("owned_by")
        if isinstance(name, str) and 0 < len(name) <= _MAX_NAME:
            stamp = created if isinstance(created, int) and 0 <= created < 2**53 else 0
            found.setdefault(name, ModelCard(name, stamp, owner[:_MAX_NAME] if isinstance(owner, str) else "upstream"))
    return list(found.values()) or "its list of models is empty"


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
