"""A request's head, read strictly: one expression for the usual ones, and the rules that hold for all.

`read_usual` takes what clients really send, and nothing that two readers could take differently; it never raises. What
it does not take goes through `check_head`, then a general parser, then `interpret`, which refuse with a reason. So the
fast way needs no error texts, and the slow way no speed.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from .contracts import RequestHead
from .errors import LimitExceeded, RemoteProtocolError

__all__ = ["MAX_FIELDS", "Fields", "HeadReceived", "check_head", "check_request_line", "interpret", "read_usual"]

MAX_FIELDS: Final = 128
"""Fields of one head. Browsers behind proxies send about 40; each costs us an object, whatever its length."""

_MAX_LENGTH_DIGITS: Final = 15
"""Digits of a Content-Length: a petabyte, and below every integer that an intermediary may overflow."""

Fields = tuple[tuple[bytes, bytes], ...]
"""Names in lower case, values without the spaces around them, in order."""

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"

# Quantifiers are possessive: no byte is looked at twice, whatever comes. Left to the slow way: other targets than a path,
# control characters, and of course everything that is wrong.
_match_usual: Final = re.compile(
    rb"(%b{1,32}+) (/[!\"$->@-~]*+)(?:\?([!\"$-~]*+))? HTTP/1\.([01])\r\n((?:%b++:[\t -~\x80-\xff]*+\r\n)*+)\r\n"
    % (_TOKEN, _TOKEN)
).fullmatch

_match_line: Final = re.compile(rb"(?:%b{1,32}) ([!-~]+) HTTP/1\.[01]" % _TOKEN).fullmatch
_match_other_version: Final = re.compile(rb"[^ ]+ [^ ]+ HTTP/(?!1\.[01])[0-9](?:\.[0-9])?").fullmatch
_match_host: Final = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?").fullmatch
_find_lengths: Final = re.compile(rb"\r\ncontent-length:([^\r\n]*)", re.IGNORECASE).findall
_match_target: Final = re.compile(r"https?://([^/?#]+)(/[^?#]*)?(?:\?([^#]*))?", re.IGNORECASE).fullmatch


class HeadReceived(Struct, frozen=True):
    """A request's head is whole."""

    head: RequestHead
    """The head."""
    version: str
    """1.0 or 1.1."""
    keep_alive: bool
    """Whether the peer lets the connection go on after this answer."""
    expects_continue: bool
    """Whether the peer waits for 100 Continue before it sends the body (RFC 9110, 10.1.1)."""
    expects_other: bool = False
    """Whether the peer expects what nobody here can do, which is answered with 417."""


def read_usual(data: bytes) -> HeadReceived | None:
    """Read a head, its empty line included.

    Returns:
        The head; None for one that is unusual or wrong.
    """
    match = _match_usual(data)
    if match is None:
        return None
    method, path, query, minor, block = match.groups()
    lines = block.split(b"\r\n")
    lines.pop()
    fields: list[tuple[bytes, bytes]] = []
    for line in lines:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), value.strip(b" \t")))
    table = dict(fields)
    if len(table) != len(fields) or len(fields) > MAX_FIELDS or b"transfer-encoding" in table:
        return None
    is_new = minor == b"1"
    host = table.get(b"host")
    if is_new if host is None else not _match_host(host):
        return None
    digits = table.get(b"content-length")
    length = None
    if digits is not None:
        if not digits.isdigit() or len(digits) > _MAX_LENGTH_DIGITS:
            return None
        length = int(digits)
    head = RequestHead(
        method.decode(), path.decode(), "" if query is None else query.decode(), tuple(fields), bool(length), length
    )
    if b"connection" not in table and b"expect" not in table:
        return HeadReceived(head, "1.1", True, False) if is_new else HeadReceived(head, "1.0", False, False)
    return _received(head, is_new)


def check_request_line(line: bytes) -> str:
    """Refuse what is no request line.

    Returns:
        The target's path, to choose the words of a later refusal by.

    Raises:
        RemoteProtocolError: 400, or 505 for a version that is not HTTP/1.
    """
    match = _match_line(line)
    if match is not None:
        return match[1].partition(b"?")[0].decode()
    if _match_other_version(line):
        raise RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are spoken here", status=505)
    raise RemoteProtocolError("the request line is malformed")


def check_head(data: bytes) -> None:
    """Refuse what general parsers accept though intermediaries disagree about it, which is how requests are smuggled.

    Raises:
        RemoteProtocolError: 400, or 431 for too many fields.
    """
    if data.count(b"\r") != data.count(b"\r\n") or b"\x00" in data:
        raise RemoteProtocolError("a bare CR or NUL in the head")
    if b"\r\n " in data or b"\r\n\t" in data:
        raise RemoteProtocolError("a folded header line (obs-fold, RFC 9112, 5.2)")
    if data.count(b"\r\n") - 2 > MAX_FIELDS:
        raise LimitExceeded("MAX_FIELDS", MAX_FIELDS, status=431)
    # RFC 9110, 8.6 lets a server take several equal lengths for one; what stands before us may take the first, or none.
    lengths = [value.strip(b" \t") for value in _find_lengths(data)]
    if len(lengths) > 1 or any(not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS for length in lengths):
        raise RemoteProtocolError("Content-Length must be one number")


def interpret(method: str, target: str, version: str, fields: Fields) -> HeadReceived:
    """Make the event of a head that somebody has parsed.

    Raises:
        RemoteProtocolError: 400, or 501 for a transfer coding that is not chunked.
    """
    hosts = [value for name, value in fields if name == b"host"]
    if any(not _match_host(host) for host in hosts):
        raise RemoteProtocolError("the Host field is malformed")
    lengths = [int(value) for name, value in fields if name == b"content-length"]
    chunked = _is_chunked(fields, version)
    if chunked and lengths:
        # RFC 9112, 6.3: may be an attempt at smuggling.
        raise RemoteProtocolError("Content-Length beside Transfer-Encoding")
    path, query = _path_and_query(method, target, hosts)
    length = lengths[0] if lengths else None
    head = RequestHead(method, path, query, fields, chunked or bool(length), length)
    return _received(head, version == "1.1")


def _received(head: RequestHead, is_new: bool) -> HeadReceived:
    """Add what the fields say of connection and expectations; HTTP/1.0 has neither (RFC 9110, 10.1.1)."""
    if not is_new:
        return HeadReceived(head, "1.0", False, False)
    expects = _members(head.headers, b"expect")
    ends = b"close" in _members(head.headers, b"connection")
    return HeadReceived(head, "1.1", not ends, b"100-continue" in expects, bool(expects - {b"100-continue"}))


def _members(fields: Fields, name: bytes) -> set[bytes]:
    """Read the list that all fields of one name make together (RFC 9110, 5.6.1), in lower case."""
    values = b",".join(value for key, value in fields if key == name)
    return {member.strip(b" \t").lower() for member in values.split(b",")} - {b""}


def _is_chunked(fields: Fields, version: str) -> bool:
    values = [value.lower() for name, value in fields if name == b"transfer-encoding"]
    if values and version == "1.0":
        raise RemoteProtocolError("Transfer-Encoding in HTTP/1.0")
    if values and values != [b"chunked"]:
        raise RemoteProtocolError("the only transfer coding is chunked, once", status=501)
    return bool(values)


def _path_and_query(method: str, target: str, hosts: list[bytes]) -> tuple[str, str]:
    """Reduce a target to path and query (RFC 9112, 3.2): absolute form to its path, the asterisk to itself."""
    if target == "*" and method == "OPTIONS":
        return target, ""
    if target.startswith("/") and "#" not in target:
        path, _, query = target.partition("?")
        return path, query
    match = _match_target(target)
    if match is None:
        raise RemoteProtocolError("the request target is neither a path nor an http URL")
    # RFC 9112, 3.2.2 has the target win over Host. Whoever decided by Host before us took another one for the name.
    if hosts and match[1].lower().encode() != hosts[0].lower():
        raise RemoteProtocolError("the request target names another host than the Host field")
    return match[2] or "/", match[3] or ""
