"""An engine with the manners of xllamacpp's Server, whose every step is the test's.

It answers in the calling thread, with JSON text; it gives up when a callback returns True; an exception in a callback
vanishes; it may raise, fall silent, or return without having ended.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Call", "ScriptedEngine", "chunk", "ended", "error", "progress", "role", "text"]

_PATIENCE_S: Final = 60.0
"""A test that would hang fails instead; nothing gets slower by it."""


def chunk(delta: dict[str, Any], finish: str | None = None, **members: Any) -> bytes:
    """A chunk of choice 0, as the engine words it: text raw, not escaped."""
    choice = {"finish_reason": finish, "index": 0, "delta": delta, **members.pop("choice", {})}
    envelope = {"created": 1, "id": "chatcmpl-x", "model": "/path/to/model.gguf", "object": "chat.completion.chunk"}
    return json.dumps({"choices": [choice], **envelope, **members}, ensure_ascii=False).encode()


def role() -> bytes:
    """The chunk that comes first, and again with every step of a prompt."""
    return chunk({"role": "assistant", "content": None})


def progress(done: int, total: int) -> bytes:
    """A step of the prompt."""
    counts = {"total": total, "cache": 0, "processed": done, "time_ms": 0}
    return chunk({"role": "assistant", "content": None}, prompt_progress=counts)


def text(said: str, **choice: Any) -> bytes:
    """A token."""
    return chunk({"content": said}, choice=choice)


def ended(reason: str = "stop", prompt: int = 10, output: int = 3, cached: int = 0) -> tuple[bytes, bytes]:
    """The two chunks that end an answer."""
    details = {"cached_tokens": cached}
    usage = {"completion_tokens": output, "prompt_tokens": prompt, "prompt_tokens_details": details}
    return chunk({}, reason), json.dumps({"choices": [], "usage": usage}).encode()


def error(kind: str, message: str = "no", code: int = 400, **members: Any) -> bytes:
    """An error in the engine's words."""
    return json.dumps({"error": {"code": code, "message": message, "type": kind, **members}}).encode()


class Call:
    """One call of the engine.

    Attributes:
        request: what it was asked.
        answers: what each callback returned.
        over: the call has returned or raised.
    """

    def __init__(self, request: bytes) -> None:
        self.request: dict[str, Any] = json.loads(request)
        self.answers: list[bool] = []
        self.over = threading.Event()
        self._steps: queue.Queue[bytes | Exception | None] = queue.Queue()

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        said = [message for message in self.request["messages"] if message["role"] == "user"]
        content: str = said[-1]["content"]
        return content

    def say(self, *data: bytes) -> None:
        """Call back with these."""
        for one in data:
            self._steps.put(one)

    def end(self, *data: bytes) -> None:
        """Call back with these and return."""
        self.say(*data)
        self._steps.put(None)

    def fail(self, failure: Exception) -> None:
        """Raise."""
        self._steps.put(failure)

    def wait(self) -> None:
        """Wait until it has returned."""
        assert self.over.wait(_PATIENCE_S), "the call does not return"

    def run(self, callback: Callable[[bytes], bool]) -> None:
        """Do what the test says, in the calling thread."""
        try:
            while (step := self._steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                self.answers.append(callback(step))
                if self.answers[-1]:
                    return
        finally:
            self.over.set()


class ScriptedEngine:
    """The engine.

    Attributes:
        calls: every call so far, in the order in which they came.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._changed = threading.Condition()

    def handle_chat_completions(self, request: bytes, callback: Callable[[bytes], bool]) -> None:
        call = Call(request)
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        call.run(callback)

    def wait_for(self, count: int) -> list[Call]:
        """Wait until there were so many calls, and give them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, _PATIENCE_S), (
                f"only {len(self.calls)} calls"
            )
            return list(self.calls)

    def release(self) -> None:
        """Let every call return."""
        for call in self.calls:
            call.end()
