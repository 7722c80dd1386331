"""What a dialled connection does once it is connected: bytes to its peer and from it, as they are or through TLS.

What a peer raises is logged, and ends its own connection only.
"""

from __future__ import annotations

import logging
import os
import socket
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from tokenwire.backends.base import Peer

from .byte_path import RECEIVE_BYTES, BytePath, Readiness
from .timers import Alarm
from .tls import ClientTls

__all__ = ["DialedPath", "PlainPath", "TlsPath", "in_words"]

_log = logging.getLogger("tokenwire.dialer")

_ENCRYPT_BYTES: Final = 64 * 1024
"""What is encrypted before the socket is asked whether it takes more: a large body is not held twice."""


def in_words(error: Exception) -> str:
    """Say what went wrong without the number that systems put before it."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class DialedPath(BytePath):
    """A socket that is connected. What its peer raises is logged, and ends this connection only.

    Attributes:
        alarm: calls `on_deadline`, unless the connection stands before.
    """

    __slots__ = ("_error", "_peer", "_told", "alarm")

    def __init__(self, sock: socket.socket, readiness: Readiness, now: Callable[[], int], peer: Peer) -> None:
        super().__init__(sock, readiness, now)
        self._peer = peer
        self._told = False
        self._error: OSError | None = None
        self.alarm: Alarm | None = None

    def begin(self, *, reading: bool) -> None:
        """Get ready to receive, and tell the peer when bytes can be sent."""
        self._paused = not reading
        self._watch()
        self._guard(self._begin)

    def receive(self) -> None:
        """Take what has arrived."""
        self._guard(super().receive)

    def set_reading(self, reading: bool) -> None:
        """Take no more bytes, or go on."""
        super().set_reading(reading)
        if reading and self._error is not None:
            self._readiness.wake_soon(self._end_broken)

    def close(self) -> None:
        """Drop the connection."""
        if not self._gone:
            self._cancel_alarm()
            self._say_goodbye()
            self._close_socket()

    def on_deadline(self) -> None:
        """The time for connecting is over."""
        if not self._told and not self._gone:
            self._guard(partial(self._fail, "the TLS handshake is not done in time"))

    @abstractmethod
    def _begin(self) -> None:
        """Say the first word, or that there is none to say."""

    @abstractmethod
    def _say_goodbye(self) -> None:
        """Say what is to be said before the socket is closed, as far as it goes."""

    def _connected(self) -> None:
        self._told = True
        self._cancel_alarm()
        self._peer.connected(self._now())

    def _cancel_alarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()

    def _flush(self) -> None:
        self._guard(super()._flush)

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001  # what a callback raises would end trio's loop, and only be logged by asyncio's
            _log.exception("the peer of a connection failed")
            self.close()

    def _broken(self, error: OSError) -> None:
        """The connection broke; a server that refuses a body may have said why before, and it is still to be read."""
        if self._error is not None:
            return
        self._error = error
        if self._out is not None:
            self._out = None
            self._readiness.remove_writer(self._sock)
        self._readiness.wake_soon(self._end_broken)

    def _end_broken(self) -> None:
        self._guard(self._read_rest)

    def _read_rest(self) -> None:
        while not self._gone and not self._paused:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                self._receive_eof(self._now())
                return
            self._receive_data(data, self._now())

    def _end(self) -> None:
        """The other side has said all."""
        self.close()
        self._peer.receive_eof(self._now())

    def _fail(self, reason: str) -> None:
        self.close()
        self._peer.failed(reason, self._now())

    def _fail_broken(self, error: OSError) -> None:
        self._fail(f"the connection broke: {in_words(error)}")


class PlainPath(DialedPath):
    """A connection without TLS."""

    __slots__ = ()

    def _begin(self) -> None:
        self._connected()

    def _say_goodbye(self) -> None:
        """There is nothing to say."""

    def _receive_data(self, data: bytes, now: int) -> None:
        self._peer.receive_data(data, now)

    def _receive_eof(self, now: int) -> None:
        del now
        if self._error is None:
            self._end()
        else:
            self._fail_broken(self._error)

    def _set_blocked(self, blocked: bool, now: int) -> None:
        self._peer.set_blocked(blocked, now)


class TlsPath(DialedPath):
    """A connection with TLS."""

    __slots__ = ("_said", "_tls", "_unsent", "_wanted")

    def __init__(
        self, sock: socket.socket, readiness: Readiness, now: Callable[[], int], peer: Peer, tls: ClientTls
    ) -> None:
        super().__init__(sock, readiness, now, peer)
        self._tls = tls
        self._wanted = True
        self._said = b""
        self._unsent: deque[memoryview] = deque()

    def begin(self, *, reading: bool) -> None:
        """Shake hands, which needs reading whether it is wanted or not."""
        self._wanted = reading
        super().begin(reading=True)

    def set_reading(self, reading: bool) -> None:
        """Take no more bytes once hands are shaken, or go on."""
        self._wanted = reading
        if not self._told:
            return
        super().set_reading(reading)
        if reading and (self._said or self._tls.ended or self._tls.failure is not None):
            self._readiness.wake_soon(partial(self._guard, self._tell))

    def write(self, data: bytes) -> None:
        """Encrypt and send as far as it goes, and keep the rest as it is."""
        if self._told and not self._gone:
            self._unsent.append(memoryview(data))
            self._encrypt()

    def _begin(self) -> None:
        self._transmit()

    def _say_goodbye(self) -> None:
        self._tls.close()
        data = self._tls.data_to_send()
        if data and self._out is None:
            try:
                os.write(self._fd, data)
            except OSError:
                pass  # nobody is there to hear it

    def _receive_data(self, data: bytes, now: int) -> None:
        del now
        self._said += self._tls.receive_data(data)
        self._transmit()
        if self._tls.established and not self._told and not self._gone:
            self._paused = not self._wanted
            self._connected()
        self._tell()

    def _receive_eof(self, now: int) -> None:
        del now
        self._tell()
        if self._gone:
            return
        if self._error is not None:
            self._fail_broken(self._error)
        elif self._told:
            self._fail("the connection ended without TLS's close_notify: what came may have been cut short")
        else:
            self._fail("the server hung up during the TLS handshake")

    def _tell(self) -> None:
        """Hand on what was said, then the end where it was said; nothing while nobody wants to read."""
        if self._said and not self._paused and not self._gone:
            said, self._said = self._said, b""
            self._peer.receive_data(said, self._now())
        if self._paused or self._gone:
            return
        if self._tls.failure is not None:
            self._fail(self._tls.failure)
        elif self._tls.ended:
            self._end()

    def _set_blocked(self, blocked: bool, now: int) -> None:
        if not blocked:
            self._encrypt()
            if self._out is not None:
                return  # blocked again, and told
        if self._told and not self._gone:
            self._peer.set_blocked(blocked, now)

    def _encrypt(self) -> None:
        while self._unsent and self._out is None and not self._gone:
            piece = self._unsent.popleft()
            if len(piece) > _ENCRYPT_BYTES:
                self._unsent.appendleft(piece[_ENCRYPT_BYTES:])
            self._tls.write(piece[:_ENCRYPT_BYTES])
            self._transmit()

    def _transmit(self) -> None:
        data = self._tls.data_to_send()
        if data:
            super().write(data)
