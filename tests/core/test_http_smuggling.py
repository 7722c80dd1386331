"""Raw bytes that two readers could take differently, or that only trouble-makers send: each with its status, and closed.

The table goes through a whole house, so that it also shows the dialect's own error shape, one record, and that no request
hidden in the bytes was begun.
"""

from __future__ import annotations

import json

import pytest
from tests.carriers import Carriage, HttpClient

from tokenwire.core._chunked import MAX_CHUNK_LINE_BYTES, MAX_TRAILER_BYTES
from tokenwire.core._head import MAX_FIELDS
from tokenwire.core.connection import Phase
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.http import MAX_HEAD_BYTES, RequestReader

HIDDEN = b"GET /chat?prompt=hidden HTTP/1.1\r\nhost: localhost\r\n\r\n"
BODIES = {
    b"/chat": b'{"prompt":"hello"}',
    b"/v1/chat/completions": b'{"model":"tiny-1","messages":[{"role":"user","content":"a"}]}',
}
# What PATH, BODY, CHUNKS and HIDDEN stand for in the table: the route, a good body for it, the same in chunks of its whole
# length, and a request that must never be taken for one.


def spell(template: bytes, path: bytes) -> bytes:
    body = BODIES[path]
    return (
        template.replace(b"HIDDEN", HIDDEN)
        .replace(b"PATH", path)
        .replace(b"HEAD", b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % path)
        .replace(b"CHUNKS", b"%x\r\n%b\r\n0\r\n" % (len(body), body))
        .replace(b"SIZE", b"%x" % len(body))
        .replace(b"LENGTH", b"%d" % len(body))
        .replace(b"BODY", body)
    )


TE = b"HEADtransfer-encoding: chunked\r\n"

REFUSED: dict[str, tuple[bytes, int]] = {
    # Content-Length and Transfer-Encoding
    "cl-te": (b"HEADcontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nHIDDEN", 400),
    "te-cl": (b"HEADtransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\nHIDDEN", 400),
    "cl-zero-te": (b"HEADcontent-length: 0\r\ntransfer-encoding: chunked\r\n\r\nHIDDEN", 400),
    "cl-te-identity": (b"HEADcontent-length: LENGTH\r\ntransfer-encoding: identity\r\n\r\nBODY", 501),
    "cl-twice-apart": (b"HEADcontent-length: 0\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "cl-twice-equal": (b"HEADcontent-length: LENGTH\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "cl-twice-in-two-cases": (b"HEADContent-Length: LENGTH\r\ncONTENT-lENGTH: 5\r\n\r\nBODY", 400),
    "cl-list-equal": (b"HEADcontent-length: LENGTH, LENGTH\r\n\r\nBODY", 400),
    "cl-list-apart": (b"HEADcontent-length: LENGTH,0\r\n\r\nBODY", 400),
    "cl-plus": (b"HEADcontent-length: +LENGTH\r\n\r\nBODY", 400),
    "cl-minus": (b"HEADcontent-length: -1\r\n\r\nHIDDEN", 400),
    "cl-hex": (b"HEADcontent-length: 0xSIZE\r\n\r\nBODY", 400),
    "cl-underscore": (b"HEADcontent-length: 1_8\r\n\r\nBODY", 400),
    "cl-inner-space": (b"HEADcontent-length: 1 8\r\n\r\nBODY", 400),
    "cl-fraction": (b"HEADcontent-length: 18.0\r\n\r\nBODY", 400),
    "cl-empty": (b"HEADcontent-length:\r\n\r\nBODY", 400),
    "cl-other-digits": (b"HEADcontent-length: \xd9\xa1\xd9\xa8\r\n\r\nBODY", 400),
    "cl-huge": (b"HEADcontent-length: 18446744073709551634\r\n\r\nBODY", 400),
    "cl-over-the-limit": (b"HEADcontent-length: 999999999999999\r\n\r\n", 413),
    "te-1.0": (b"POST PATH HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nCHUNKS\r\n", 400),
    "te-twice": (b"HEADtransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\nCHUNKS\r\n", 501),
    "te-twice-identity": (b"HEADtransfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\nCHUNKS\r\n", 501),
    "te-list": (b"HEADtransfer-encoding: identity, chunked\r\n\r\nCHUNKS\r\n", 501),
    "te-list-twice": (b"HEADtransfer-encoding: chunked, chunked\r\n\r\nCHUNKS\r\n", 501),
    "te-list-empty-member": (b"HEADtransfer-encoding: ,chunked\r\n\r\nCHUNKS\r\n", 501),
    "te-gzip": (b"HEADtransfer-encoding: gzip\r\n\r\nBODY", 501),
    "te-identity": (b"HEADtransfer-encoding: identity\r\n\r\nBODY", 501),
    "te-unknown": (b"HEADtransfer-encoding: xchunked\r\n\r\nCHUNKS\r\n", 501),
    "te-quoted": (b'HEADtransfer-encoding: "chunked"\r\n\r\nCHUNKS\r\n', 501),
    "te-parameter": (b"HEADtransfer-encoding: chunked;q=1\r\n\r\nCHUNKS\r\n", 501),
    "te-empty": (b"HEADtransfer-encoding:\r\n\r\nCHUNKS\r\n", 501),
    "te-vertical-tab": (b"HEADtransfer-encoding: \x0bchunked\r\n\r\nCHUNKS\r\n", 400),
    "te-control": (b"HEADtransfer-encoding: chunked\x01\r\n\r\nCHUNKS\r\n", 501),
    "te-folded": (b"HEADtransfer-encoding:\r\n chunked\r\n\r\nCHUNKS\r\n", 400),
    "te-space-before-colon": (b"HEADtransfer-encoding : chunked\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "te-after-bare-lf": (b"HEADx: y\ntransfer-encoding: chunked\r\n\r\nCHUNKS\r\n", 400),
    "te-after-bare-cr": (b"HEADx: y\rtransfer-encoding: chunked\r\ncontent-length: 0\r\n\r\nCHUNKS\r\n", 400),
    # the coding itself
    "chunk-size-plus": (TE + b"\r\n+SIZE\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-minus": (TE + b"\r\n-SIZE\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-0x": (TE + b"\r\n0xSIZE\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-underscore": (TE + b"\r\n0_SIZE\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-space-before": (TE + b"\r\n SIZE\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-space-behind": (TE + b"\r\nSIZE \r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-tab-behind": (TE + b"\r\nSIZE\t\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-empty": (TE + b"\r\n\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-only-extension": (TE + b"\r\n;a\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-no-hex": (TE + b"\r\nxyz\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-nul": (TE + b"\r\nSIZE\x00\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-wraps": (TE + b"\r\n1000000000000000SIZE\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-lf": (TE + b"\r\nSIZE\nBODY\r\n0\r\n\r\n", 400),
    "chunk-size-cr": (TE + b"\r\nSIZE\rBODY\r\n0\r\n\r\n", 400),
    "chunk-end-lf": (TE + b"\r\nSIZE\r\nBODY\n0\r\n\r\n", 400),
    "chunk-end-missing": (TE + b"\r\nSIZE\r\nBODY0\r\n\r\n", 400),
    "chunk-end-other": (TE + b"\r\nSIZE\r\nBODYXX0\r\n\r\n", 400),
    "chunk-extension-lf": (TE + b"\r\nSIZE;a\nb\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-extension-lf-hides": (TE + b"\r\n0;\nHIDDEN\r\n", 400),
    "chunk-extension-cr": (TE + b"\r\nSIZE;a\rb\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-extension-nul": (TE + b"\r\nSIZE;a\x00\r\nBODY\r\n0\r\n\r\n", 400),
    "chunk-extension-long": (TE + b"\r\nSIZE;" + b"a" * MAX_CHUNK_LINE_BYTES + b"\r\nBODY\r\n0\r\n\r\n", 400),
    "last-chunk-lf": (TE + b"\r\nSIZE\r\nBODY\r\n0\n\n", 400),
    "last-chunk-lf-behind": (TE + b"\r\nSIZE\r\nBODY\r\n0\r\n\n", 400),
    "trailer-length": (TE + b"\r\nCHUNKScontent-length: 5\r\n\r\n", 400),
    "trailer-te": (TE + b"\r\nCHUNKSTransfer-Encoding: chunked\r\n\r\n", 400),
    "trailer-host": (TE + b"\r\nCHUNKShost: evil.example\r\n\r\n", 400),
    "trailer-authorization": (TE + b"\r\nCHUNKSauthorization: Bearer x\r\n\r\n", 400),
    "trailer-lf": (TE + b"\r\nCHUNKSx: y\nz: w\r\n\r\n", 400),
    "trailer-folded": (TE + b"\r\nCHUNKSx: y\r\n z\r\n\r\n", 400),
    "trailer-space-before-colon": (TE + b"\r\nCHUNKSx : y\r\n\r\n", 400),
    "trailer-nul": (TE + b"\r\nCHUNKSx: \x00\r\n\r\n", 400),
    "trailers-long": (TE + b"\r\nCHUNKSx: " + b"y" * MAX_TRAILER_BYTES + b"\r\n\r\n", 431),
    # lines and fields
    "bare-lf": (b"POST PATH HTTP/1.1\nhost: localhost\ncontent-length: 0\n\n", 400),
    "bare-lf-in-fields": (b"HEADx: y\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "bare-lf-at-the-end": (b"HEADcontent-length: LENGTH\r\n\nBODY\r\n\r\n", 400),
    "bare-cr": (b"HEADx: y\rz\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "bare-cr-cr-lf": (b"HEADcontent-length: LENGTH\r\r\n\r\nBODY", 400),
    "nul-in-value": (b"HEADx: \x00\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "nul-in-name": (b"HEADx\x00: y\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "vertical-tab-ends-no-line": (b"HEADx: y\x0bcontent-length: 0\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "obs-fold": (b"HEADx: y\r\n z\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "obs-fold-tab": (b"HEADx: y\r\n\tz\r\ncontent-length: LENGTH\r\n\r\nBODY", 400),
    "obs-fold-of-length": (b"HEADcontent-length:\r\n LENGTH\r\n\r\nBODY", 400),
    "obs-fold-first": (b"POST PATH HTTP/1.1\r\n host: localhost\r\n\r\n", 400),
    "space-before-colon": (b"HEADcontent-length : LENGTH\r\n\r\nBODY", 400),
    "tab-before-colon": (b"HEADcontent-length\t: LENGTH\r\n\r\nBODY", 400),
    "space-in-name": (b"HEADx y: z\r\n\r\n", 400),
    "no-colon": (b"HEADnonsense\r\n\r\n", 400),
    "no-name": (b"HEAD: z\r\n\r\n", 400),
    "name-not-ascii": (b"HEADx\xe9: z\r\n\r\n", 400),
    "many-fields": (b"HEAD" + b"".join(b"x-%d: y\r\n" % number for number in range(MAX_FIELDS)) + b"\r\n", 431),
    "long-field": (b"HEADx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
    "long-name": (b"HEAD" + b"y" * MAX_HEAD_BYTES + b": x\r\n\r\n", 431),
    "endless-fields": (b"HEAD" + b"x: y\r\n" * MAX_HEAD_BYTES, 431),
    # Host
    "no-host": (b"POST PATH HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 400),
    "two-hosts": (b"POST PATH HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n", 400),
    "two-equal-hosts": (b"POST PATH HTTP/1.1\r\nhost: localhost\r\nHost: localhost\r\n\r\n", 400),
    "host-list": (b"POST PATH HTTP/1.1\r\nhost: localhost, evil.example\r\n\r\n", 400),
    "host-comma": (b"POST PATH HTTP/1.1\r\nhost: localhost,evil.example\r\n\r\n", 400),
    "host-path": (b"POST PATH HTTP/1.1\r\nhost: localhost/evil\r\n\r\n", 400),
    "host-user": (b"POST PATH HTTP/1.1\r\nhost: evil@localhost\r\n\r\n", 400),
    "host-port": (b"POST PATH HTTP/1.1\r\nhost: localhost:x\r\n\r\n", 400),
    "host-not-ascii": (b"POST PATH HTTP/1.1\r\nhost: localh\xf6st\r\n\r\n", 400),
    "target-names-another-host": (b"POST http://localhostPATH HTTP/1.1\r\nhost: evil.example\r\n\r\n", 400),
    # the request line; the path of an odd target is nobody's, and is refused in our own words
    "target-fragment": (b"POST PATH#x HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "target-space": (b"POST PATH x HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "target-tab": (b"POST PATH\tx HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "target-control": (b"POST PATH\x7f HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "target-not-ascii": (b"POST PATH\xc3\xa9 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "target-long": (b"POST PATH?" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 414),
    "two-spaces": (b"POST  PATH HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "tab-between": (b"POST\tPATH HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "space-behind-version": (b"POST PATH HTTP/1.1 \r\nhost: localhost\r\n\r\n", 400),
    "http-0.9": (b"GET PATH\r\n\r\n", 400),
    "http-1.2": (b"POST PATH HTTP/1.2\r\nhost: localhost\r\n\r\n", 505),
    "http-2.0": (b"POST PATH HTTP/2.0\r\nhost: localhost\r\n\r\n", 505),
    "http-3": (b"POST PATH HTTP/3\r\nhost: localhost\r\n\r\n", 505),
    "version-of-three": (b"POST PATH HTTP/1.1.1\r\nhost: localhost\r\n\r\n", 400),
    "version-in-lower-case": (b"POST PATH http/1.1\r\nhost: localhost\r\n\r\n", 400),
    "version-1.01": (b"POST PATH HTTP/1.01\r\nhost: localhost\r\n\r\n", 400),
    "version-not-ascii": (b"POST PATH HTTP/1.\xb9\r\nhost: localhost\r\n\r\n", 400),
}  # fmt: skip

NOBODYS: dict[str, tuple[bytes, int]] = {
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "tls": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", 400),
    "nothing-but-lf": (b"\n\n", 400),
    "authority-form": (b"CONNECT localhost:443 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "authority-form-of-get": (b"GET localhost HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "asterisk-of-get": (b"GET * HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "other-scheme": (b"GET ftp://localhost/ HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "user-in-target": (b"GET http://localhost@evil.example/ HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "fragment-in-absolute-form": (b"GET http://localhost/#x HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "absolute-form-without-host": (b"GET http:///healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "relative": (b"GET healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "backslash": (b"GET \\\\localhost\\healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "long-method": (b"A" * 33 + b" /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "endless-method": (b"A" * (MAX_HEAD_BYTES + 1), 414),
    "method-not-ascii": (b"G\xcbT /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "method-with-colon": (b"GET: /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "cr-first": (b"\rGET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "byte-order-mark": (b"\xef\xbb\xbfGET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "response": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 400),
}

ANSWERED: dict[str, tuple[bytes, int]] = {
    "lower-case-method": (b"get /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 405),
    "unknown-method": (b"BREW /chat HTTP/1.1\r\nhost: localhost\r\n\r\n", 405),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    "absolute-form": (b"GET http://localhost/healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 200),
    "absolute-form-of-another-host": (b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n", 403),
    "double-slash": (b"GET //localhost/healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    "dots": (b"GET /../healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    "escaped-path": (b"GET /%68ealthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    "empty-lines-before": (b"\r\n\r\nGET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 200),
    "empty-host": (b"GET /v1/models HTTP/1.1\r\nhost:\r\n\r\n", 403),
    "http-1.0-without-host": (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    "length-of-get": (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc", 200),
    "chunked-get": (b"GET /healthz HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200),
    "te-in-upper-case": (
        b"GET /healthz HTTP/1.1\r\nhost: a\r\nTRANSFER-ENCODING: \tCHUNKED \r\n\r\n3;a=b\r\nabc\r\n0\r\nx: y\r\n\r\n", 200
    ),
    "obs-text": (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: \xe9\xff\r\n\r\n", 200),
    "expect-other": (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nexpect: 200-ok\r\n\r\n", 417),
    "expect-two": (b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue, x\r\n\r\n", 417),
    "expect-of-1.0": (b"GET /healthz HTTP/1.0\r\nhost: localhost\r\nexpect: x\r\n\r\n", 200),
}  # fmt: skip


def is_openai_error(error: dict[str, object]) -> bool:
    return set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize(("template", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_closed(template: bytes, status: int, path: bytes) -> None:
    house = Carriage("http").house()
    client = HttpClient(house)
    answer = client.ask_bytes(spell(template, path) + HIDDEN)
    assert (answer.status, answer.closed) == (status, True)
    assert len(client.answers()) == 1
    assert house.source.jobs == []
    assert [record.status for record in house.records] == [status]
    error = json.loads(answer.body)["error"]
    line = spell(template, path).split(b"\r\n")[0]
    if line == b"POST %b HTTP/1.1" % path:
        assert is_openai_error(error) is path.startswith(b"/v1/")


@pytest.mark.parametrize(("data", "status"), NOBODYS.values(), ids=NOBODYS)
def test_what_is_no_request_of_any_dialect(data: bytes, status: int) -> None:
    house = Carriage("http").house()
    answer = HttpClient(house).ask_bytes(data, eof=True)
    assert (answer.status, answer.closed) == (status, True)
    assert not is_openai_error(json.loads(answer.body)["error"])
    assert len(house.records) == 1


@pytest.mark.parametrize(("data", "status"), ANSWERED.values(), ids=ANSWERED)
def test_what_is_odd_and_answered(data: bytes, status: int) -> None:
    house = Carriage("http").house()
    client = HttpClient(house)
    answer = client.ask_bytes(data, data.split()[0].decode())
    assert answer.status == status
    # Of a body in chunks nobody knows how long it is: it is not waited for where nothing wants it.
    assert answer.closed is (b"HTTP/1.0" in data or b"chunked" in data.lower())
    assert [record.status for record in house.records] == [status]


@pytest.mark.parametrize("path", sorted(BODIES))
def test_the_table_begins_where_a_good_request_is_good(path: bytes) -> None:
    for template in (b"HEADcontent-length: LENGTH\r\n\r\nBODY", TE + b"\r\nCHUNKS\r\n", TE + b"\r\nCHUNKSx: y\r\n\r\n"):
        house = Carriage("http").house()
        answer = HttpClient(house).ask_bytes(spell(template, path))
        assert (answer.status, len(house.source.jobs)) == (200, 1)


@pytest.mark.parametrize("template", [case for case, _ in REFUSED.values() if len(case) < 1000])
def test_a_refusal_does_not_depend_on_how_it_is_cut(template: bytes) -> None:
    data = spell(template, b"/chat")

    def read(pieces: list[bytes]) -> str:
        reader = RequestReader()
        try:
            for piece in pieces:
                reader.receive_data(piece)
            reader.check()
        except RemoteProtocolError as error:
            return f"{error.status} {error}"
        return "read"

    assert read([bytes([byte]) for byte in data]) == read([data])


def test_a_request_hidden_behind_a_running_stream_waits_for_its_turn() -> None:
    house = Carriage("http").house()
    house.source.script = None
    client = HttpClient(house)
    client.begin_bytes(spell(b"HEADcontent-length: LENGTH\r\n\r\nBODY", b"/chat") + b"PRI * HTTP/2.0\r\n\r\n", "POST")
    assert client.peer.connection.phase is Phase.ANSWERING
    house.say(house.source.jobs[0], "a")
    client.peer.receive(b"more of what is no request\r\n\r\n")
    assert client.answers()[0].status == 200
    assert house.records == []
