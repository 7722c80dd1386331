"""TLS as a machine, against the system's OpenSSL on the other side, without a socket."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.authorities import Certificates

from tokenwire.adapters.tls import ClientTls, TlsNameError, default_context


class Server:
    """The other side, on memory."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self.shaken = False
        self.notified = False
        self.received = b""

    def take(self, data: bytes) -> bytes:
        """Take bytes, give what answers them."""
        self._in.write(data)
        try:
            if not self.shaken:
                self._tls.do_handshake()
                self.shaken = True
            while piece := self._tls.read():
                self.received += piece
            self.notified = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.notified = True
        return self._out.read()

    def say(self, data: bytes) -> bytes:
        while data:
            data = data[self._tls.write(data) :]
        return self._out.read()

    def notify(self) -> bytes:
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._out.read()


def shake_hands(client: ClientTls, server: Server) -> None:
    while data := client.data_to_send():
        client.receive_data(server.take(data))
    assert client.established


@pytest.fixture
def pair(certificates: Certificates) -> tuple[ClientTls, Server]:
    client, server = ClientTls(certificates.client, "server.test"), Server(certificates.server)
    shake_hands(client, server)
    assert server.shaken
    return client, server


Pair = tuple[ClientTls, Server]


def test_both_ways(pair: Pair) -> None:
    client, server = pair
    client.write(b"ask")
    server.take(client.data_to_send())
    assert server.received == b"ask"
    assert client.receive_data(server.say(b"answer")) == b"answer"
    assert not client.ended
    assert client.failure is None


def test_the_answer_and_its_end_in_one_read(pair: Pair) -> None:
    client, server = pair
    assert client.receive_data(server.say(b"answer") + server.notify()) == b"answer"
    assert client.ended
    assert client.receive_data(b"anything") == b""
    assert client.failure is None


def test_close_says_so_and_waits_for_nothing(pair: Pair) -> None:
    client, server = pair
    client.close()
    server.take(client.data_to_send())
    assert server.notified


def test_close_answers_a_close(pair: Pair) -> None:
    client, server = pair
    client.receive_data(server.notify())
    client.close()
    server.take(client.data_to_send())
    assert server.notified


def test_data_before_a_forged_record_is_still_said(pair: Pair) -> None:
    client, server = pair
    good, forged = server.say(b"good"), bytearray(server.say(b"forged"))
    forged[-1] ^= 1
    assert client.receive_data(good + bytes(forged)) == b"good"
    assert client.failure is not None
    assert client.failure.startswith("TLS failed: ")
    assert client.data_to_send()  # the alert
    assert client.receive_data(server.say(b"more")) == b""
    client.write(b"never")
    client.close()
    assert client.data_to_send() == b""


@given(
    st.lists(st.integers(1, 6_000), max_size=12),
    st.lists(st.binary(min_size=1, max_size=30_000), max_size=4),
)
def test_however_it_is_cut(certificates: Certificates, cuts: list[int], said: list[bytes]) -> None:
    client, server = ClientTls(certificates.client, "server.test"), Server(certificates.server)
    shake_hands(client, server)
    data = b"".join(map(server.say, said)) + server.notify()
    heard = b""
    for size in cuts:
        heard += client.receive_data(data[:size])
        data = data[size:]
    heard += client.receive_data(data)
    assert heard == b"".join(said)
    assert client.ended
    assert client.failure is None


@given(st.binary(max_size=200))
def test_bytes_that_are_no_tls(certificates: Certificates, data: bytes) -> None:
    client = ClientTls(certificates.client, "server.test")
    client.data_to_send()
    assert client.receive_data(data) == b""
    assert not client.established
    assert not client.ended
    client.write(b"never")
    client.close()


def test_before_the_handshake_nothing_is_said(certificates: Certificates) -> None:
    client = ClientTls(certificates.client, "server.test")
    hello = client.data_to_send()
    client.write(b"never")
    client.close()
    assert hello
    assert client.data_to_send() == b""


@pytest.mark.parametrize("host", ["server.test", "server.test.", "SERVER.test", "127.0.0.1", "::1", "::1%lo"])
def test_names_and_addresses_that_are_verified(certificates: Certificates, host: str) -> None:
    client = ClientTls(certificates.client, host)
    shake_hands(client, Server(certificates.server))
    assert client.failure is None


@pytest.mark.parametrize("host", ["", ".test", "a" * 300, "nul\0.test"])
def test_names_that_no_certificate_is_for(certificates: Certificates, host: str) -> None:
    with pytest.raises(TlsNameError, match="there is no certificate for the name"):
        ClientTls(certificates.client, host)


def test_the_default_context_verifies() -> None:
    context = default_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert default_context() is context
