"""Which tool call a fragment belongs to: one router for every server that speaks Chat Completions more or less.

OpenAI gives each call an index, and its id and its name once, on its first fragment. Others leave the index out or give
every call the same, repeat id and name, change the id on the way, or give no id. The rules, the first that applies:

1. **A known id** names its call, whatever the index says.
2. **An unknown id with a name** opens a call, also where its index is taken by a call of another id. Without a name it
   belongs to the call of its index, whose own id stays: some servers make a new id for each fragment.
3. **An index** without an id names the call of that index, or opens one. Without an index, the fragments of one chunk
   that have neither are told apart by their order, and a fragment alone goes on with the call that came last.
4. Where rule 3 finds a call, the fragment opens another all the same if it has **another name**, or if the call has no id
   and **its arguments are a complete JSON object** and the fragment begins a new one.

A call is numbered by its coming, so that numbers have no holes. Its id and its name are the first that came. A name in
pieces is not put together: it cannot be told from one that another follows, and OpenAI sends names whole.
"""

from __future__ import annotations

from typing import Final, TypeVar

from tokenwire.core.errors import MalformedData
from tokenwire.core.states import MAX_CALLS

__all__ = ["CallRouter", "OpenCall"]

_MAX_ALIASES: Final = 8 * MAX_CALLS
"""The most ids and the most indexes that are remembered: a server may make up one for each fragment."""

_KeyT = TypeVar("_KeyT", int, str)


class _JsonExtent:
    """Where a JSON object ends that comes in pieces: brackets are counted, nothing else is checked."""

    __slots__ = ("_depth", "_escaped", "_in_string", "complete")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.complete = False

    def receive(self, text: str) -> None:
        for character in text:
            if self._in_string:
                self._step_in_string(character)
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self.complete = self._depth == 0

    def _step_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False


class OpenCall:
    """A tool call as far as it has come: its start waits until the name and the id are known or can wait no longer.

    Attributes:
        number: its number among the choice's calls.
        call_id: its id, "" while none has come.
        name: its name, "" while none has come.
        started: whether its start has been told.
    """

    __slots__ = ("_extent", "call_id", "name", "number", "started")

    def __init__(self, number: int) -> None:
        self.number = number
        self.call_id = ""
        self.name = ""
        self.started = False
        self._extent = _JsonExtent()

    def learn(self, call_id: str, name: str, arguments: str) -> None:
        """Take what a fragment says; an id and a name that are known stay."""
        self.call_id = self.call_id or call_id
        self.name = self.name or name
        if not self.call_id:
            self._extent.receive(arguments)

    def is_followed_by(self, name: str, arguments: str) -> bool:
        """Say whether a fragment that would go on with the call begins another one (rule 4)."""
        if name and self.name and name != self.name:
            return True
        return self._extent.complete and not self.call_id and arguments.lstrip().startswith("{")


class CallRouter:
    """The calls of one choice."""

    __slots__ = ("_by_id", "_by_index", "_calls")

    def __init__(self) -> None:
        self._by_id: dict[str, OpenCall] = {}
        self._by_index: dict[int, OpenCall] = {}
        self._calls: list[OpenCall] = []

    def route(self, call_id: str, index: int | None, name: str, arguments: str) -> OpenCall:
        """Find a fragment's call, or open one for it.

        Args:
            call_id: the fragment's id, or "".
            index: its index where it has one; its place in the chunk where several have neither index nor id.
            name: its name, or "".
            arguments: its piece of the arguments.

        Raises:
            MalformedData: there are more than MAX_CALLS calls.
        """
        if not call_id and not name and index is not None:  # what nearly every fragment but the first looks like
            call = self._by_index.get(index)
            if call is not None and call.call_id:
                return call
        call = self._find(call_id, index, name, arguments)
        if call is None:
            call = self._open()
        if index is not None:
            _remember(self._by_index, index, call)
        call.learn(call_id, name, arguments)
        if call_id:
            _remember(self._by_id, call_id, call)
        return call

    def waiting(self) -> list[OpenCall]:
        """List the calls whose start has not been told."""
        return [call for call in self._calls if not call.started]

    def _find(self, call_id: str, index: int | None, name: str, arguments: str) -> OpenCall | None:
        if call_id in self._by_id:
            return self._by_id[call_id]
        last = self._calls[-1] if self._calls else None
        call = last if index is None else self._by_index.get(index)
        if call is None:
            return None
        if call_id and call.call_id:
            return call if index is not None and not name else None
        return None if call.is_followed_by(name, arguments) else call

    def _open(self) -> OpenCall:
        if len(self._calls) >= MAX_CALLS:
            raise MalformedData(f"a choice has more than {MAX_CALLS} tool calls")
        call = OpenCall(len(self._calls))
        self._calls.append(call)
        return call


def _remember(aliases: dict[_KeyT, OpenCall], key: _KeyT, call: OpenCall) -> None:
    if key in aliases or len(aliases) < _MAX_ALIASES:
        aliases[key] = call
