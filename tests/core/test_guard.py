"""Hosts, origins and sites, beside the policy tests that ask through a carrier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core.contracts import RequestHead
from tokenwire.core.guard import LOOPBACK_HOSTS, Guard, shown


def head(**headers: str) -> RequestHead:
    pairs = tuple((name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items())
    return RequestHead("GET", "/chat", headers=pairs)


def code(guard: Guard, asked: RequestHead, *, generates: bool = True) -> str | None:
    refusal = guard.refusal(asked, generates=generates)
    return None if refusal is None else refusal.code


LOCAL = Guard()
PUBLIC = Guard(allowed_hosts=None)
APP = Guard(allowed_hosts=None, allowed_origins=frozenset({"https://app.test"}))
ANY = Guard(allowed_origins=frozenset({"*"}))


@pytest.mark.parametrize(
    ("guard", "asked", "expected"),
    [
        (LOCAL, head(host="localhost:80"), None),
        (LOCAL, head(), "host_not_allowed"),
        (LOCAL, head(host="a.test"), "host_not_allowed"),
        (LOCAL, head(host="localhost:x"), "host_not_allowed"),
        (LOCAL, head(host="localhost", origin="http://127.0.0.1:5"), None),
        (LOCAL, head(host="localhost", origin="https://a.test"), "origin_not_allowed"),
        (LOCAL, head(host="localhost", origin="null"), "origin_not_allowed"),
        (LOCAL, head(host="localhost", sec_fetch_site="cross-site"), "cross_site_request"),
        (LOCAL, head(host="localhost", origin="http://localhost", sec_fetch_site="cross-site"), None),
        (PUBLIC, head(host="a.test"), None),
        (PUBLIC, head(), None),
        (PUBLIC, head(host="a.test", origin="https://a.test"), None),
        (PUBLIC, head(host="a.test:1", origin="https://a.test:2"), "origin_not_allowed"),
        (PUBLIC, head(host="a.test", origin="http://localhost"), "origin_not_allowed"),
        (PUBLIC, head(host="", origin="null"), "origin_not_allowed"),
        (APP, head(host="a.test", origin="https://app.test"), None),
        (APP, head(host="a.test", origin="https://app.test.evil"), "origin_not_allowed"),
        (APP, head(host="a.test", origin="http://app.test"), "origin_not_allowed"),
        (ANY, head(host="localhost", origin="https://any.test"), None),
        (ANY, head(host="localhost", origin="null"), None),
    ],
)
def test_who_may_pass(guard: Guard, asked: RequestHead, expected: str | None) -> None:
    assert code(guard, asked) == expected


def test_only_what_generates_minds_the_site() -> None:
    asked = head(host="localhost", sec_fetch_site="cross-site")
    assert code(LOCAL, asked, generates=False) is None


@given(st.text(st.characters(max_codepoint=255), max_size=20), st.text(st.characters(max_codepoint=255), max_size=20))
def test_whatever_the_headers_say_there_is_an_answer(host: str, origin: str) -> None:
    asked = head(host=host, origin=origin)
    if code(LOCAL, asked) is None:
        assert host.rpartition(":")[0].lower() in LOOPBACK_HOSTS or host.lower() in LOOPBACK_HOSTS
    assert bool(LOCAL.cors(asked)) is LOCAL.allows_origin(origin, host)


def test_cors_is_for_allowed_origins() -> None:
    assert LOCAL.cors(head(host="localhost")) == ()
    assert LOCAL.cors(head(host="localhost", origin="https://a.test")) == ()
    names = [name for name, _ in LOCAL.cors(head(host="localhost", origin="http://localhost"))]
    assert names == ["access-control-allow-origin", "access-control-expose-headers", "vary"]


@given(st.text())
def test_what_is_shown_is_short_and_harmless(text: str) -> None:
    quoted = shown(text)
    assert quoted.isprintable()
    assert text != quoted
    assert len(shown("a" * 10_000)) <= 82
