"""The errors of the core: one root, and leaves that say whose fault it was.

TokenwireError              the root; never raised itself
+-- LocalProtocolError      our side broke a rule: a bug in the caller or in a backend
|   +-- GrammarError        an event that the stream's grammar does not allow here
+-- RemoteProtocolError     the peer broke a rule; carries the HTTP status that answers it
|   +-- LimitExceeded       the peer went past a named limit
|   +-- MalformedData       bytes that are not what their framing or dialect promises
+-- RequestRefused          a request that is answered with an error and not with a stream
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .events import StreamError

__all__ = [
    "GrammarError",
    "LimitExceeded",
    "LocalProtocolError",
    "MalformedData",
    "RemoteProtocolError",
    "RequestRefused",
    "TokenwireError",
]


class TokenwireError(Exception):
    """Root of every error that the core raises.

    Catch it; do not raise it. A root that could be raised would tell nobody whose fault it was.
    """

    def __init__(self, *args: object) -> None:
        if type(self) is TokenwireError:
            raise TypeError("TokenwireError is the root of a tree: raise one of its leaves")
        super().__init__(*args)


class LocalProtocolError(TokenwireError):
    """Our own side used a machine wrongly: the machine's state is as it was before the call."""


class GrammarError(LocalProtocolError):
    """An event came that the stream's grammar does not allow in its present state.

    Args:
        event: the class name of the event.
        state: the name of the state that does not take it.
        key: which choice or call the state belongs to, "" for the stream itself.
    """

    def __init__(self, event: str, state: str, key: str = "") -> None:
        where = f" of {key}" if key else ""
        super().__init__(f"{event} is not allowed in state {state}{where}")
        self.event = event
        self.state = state
        self.key = key


class RemoteProtocolError(TokenwireError):
    """The peer broke a protocol rule.

    Attributes:
        status: the HTTP status that answers it where an answer is still possible.
    """

    default_status: ClassVar[int] = 400

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = self.default_status if status is None else status


class LimitExceeded(RemoteProtocolError):
    """The peer sent more than a named limit allows.

    Attributes:
        limit: the limit's name, as in the constructor that takes it.
        maximum: its value.
    """

    default_status = 413

    def __init__(self, limit: str, maximum: int, *, status: int | None = None) -> None:
        super().__init__(f"more than {limit}={maximum}", status=status)
        self.limit = limit
        self.maximum = maximum


class MalformedData(RemoteProtocolError):
    """Bytes that cannot be what their framing or dialect says they are."""


class RequestRefused(TokenwireError):
    """A request is refused; `error` says why, in neutral terms, for the dialect to word.

    Attributes:
        error: the refusal as the value that every dialect can encode.
        headers: what the answer's head must carry besides, such as Allow or Retry-After.
    """

    def __init__(self, error: StreamError, *, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(error.message)
        self.error = error
        self.headers = headers
