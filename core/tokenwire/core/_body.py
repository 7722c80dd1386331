"""The bodies of requests, taken out of their framing (RFC 9112, 6): what is common to all, and those of a known length."""

from __future__ import annotations

from typing import Protocol

__all__ = ["BodyReader", "LengthBody"]


class BodyReader(Protocol):
    """What reads one body."""

    def receive_data(self, data: bytes, out: list[bytes]) -> bytes | None:
        """Take bytes, append to `out` what they hold of the body.

        Returns:
            None as long as the body goes on, else what came behind its end.

        Raises:
            RemoteProtocolError: it is not the framing. What came before the fault is in `out`; nothing more may be taken.
        """
        ...


class LengthBody:
    """A body of a known length.

    Args:
        length: its bytes.
    """

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    def receive_data(self, data: bytes, out: list[bytes]) -> bytes | None:
        """Take bytes; see `BodyReader`."""
        left = self._left
        if len(data) < left:
            self._left = left - len(data)
            if data:
                out.append(data)
            return None
        self._left = 0
        if left:
            out.append(data[:left])
        return data[left:]
