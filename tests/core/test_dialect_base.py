"""What the dialects share: the error table, the parameter table, escapes."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import any_text, texts

from tokenwire.core.collect import Result
from tokenwire.core.dialects import base
from tokenwire.core.dialects._incoming_errors import error_from_wire
from tokenwire.core.dialects.base import ERRORS, Fields, Parameter, ParameterTable, Policy
from tokenwire.core.errors import LocalProtocolError, RequestRefused
from tokenwire.core.events import (
    ErrorKind,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    UsageReport,
)

ERROR_TABLE = {
    "invalid_request": (400, "invalid_request_error", False),
    "authentication": (401, "authentication_error", False),
    "permission": (403, "permission_error", False),
    "not_found": (404, "not_found_error", False),
    "method_not_allowed": (405, "invalid_request_error", False),
    "conflict": (409, "conflict_error", False),
    "too_large": (413, "request_too_large", False),
    "unsupported_media_type": (415, "invalid_request_error", False),
    "rate_limit": (429, "rate_limit_error", True),
    "server": (500, "server_error", False),
    "unavailable": (503, "service_unavailable", True),
    "timeout": (504, "timeout_error", True),
    "overloaded": (529, "overloaded_error", True),
}


class Point(msgspec.Struct):
    """A typed value to look into."""

    x: int


TABLE = ParameterTable(
    {
        "count": Parameter(Annotated[int, msgspec.Meta(ge=1, le=5)]),
        "flag": Parameter(bool),
        "points": Parameter(list[Point]),
        "sizes": Parameter(dict[str, int]),
        "heat": Parameter(float, "temperature", Policy.IGNORABLE, 1),
        "note": Parameter(object, None, Policy.IGNORABLE),
        "shape": Parameter(dict[str, object], "response_format", Policy.MUST_HONOUR, {"type": "text"}),
    }
)


def read(body: str | bytes) -> Fields:
    return TABLE.read(body.encode() if isinstance(body, str) else body)


def refusal(body: str | bytes) -> StreamError:
    with pytest.raises(RequestRefused) as refused:
        read(body)
    return refused.value.error


# ---- errors


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_error_has_its_row(kind: ErrorKind) -> None:
    error = StreamError(kind, "no")
    assert (base.status_of(error), base.type_of(error), base.is_retryable(error)) == ERROR_TABLE[kind]
    assert set(ERRORS) == set(ErrorKind)


def test_an_error_may_have_its_own_status_and_be_retryable_by_its_own_word() -> None:
    assert base.status_of(StreamError(ErrorKind.SERVER, "no", status=502)) == 502
    assert base.status_of(StreamError(ErrorKind.SERVER, "no", status=200)) == 500
    assert base.is_retryable(StreamError(ErrorKind.SERVER, "no", retryable=True))


def test_every_failure_can_be_worded_as_an_error() -> None:
    error = StreamError(ErrorKind.TIMEOUT, "late")
    assert base.failure_of(error) is error
    truncated = base.failure_of(StreamTruncated("the socket closed", 12))
    assert (truncated.code, truncated.retryable) == ("stream_truncated", True)
    assert "the socket closed" in truncated.message
    cancelled = base.failure_of(StreamCancelled("operator"))
    assert (cancelled.code, cancelled.retryable) == ("cancelled", False)
    assert "operator" in cancelled.message


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_error_comes_back_from_openais_shape_where_its_word_is_its_own(kind: ErrorKind) -> None:
    error = StreamError(kind, "no", "a_code", "field")
    back = error_from_wire(base.openai_error(error))
    lossy = {ErrorKind.METHOD_NOT_ALLOWED, ErrorKind.UNSUPPORTED_MEDIA_TYPE}
    assert back.kind == (ErrorKind.INVALID_REQUEST if kind in lossy else kind)
    assert (back.message, back.code, back.param) == ("no", "a_code", "field")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("overloaded", StreamError(ErrorKind.SERVER, "overloaded")),
        ({"message": "m"}, StreamError(ErrorKind.SERVER, "m")),
        ({"message": "m", "code": 429}, StreamError(ErrorKind.RATE_LIMIT, "m", "429", status=429)),
        ({"message": "m", "code": "404"}, StreamError(ErrorKind.NOT_FOUND, "m", "404", status=404)),
        ({"message": "m", "code": 418}, StreamError(ErrorKind.INVALID_REQUEST, "m", "418", status=418)),
        ({"message": "m", "code": 599}, StreamError(ErrorKind.SERVER, "m", "599", status=599)),
        ({"message": "m", "code": 7}, StreamError(ErrorKind.SERVER, "m", "7")),
        ({"message": "m", "status": 503}, StreamError(ErrorKind.UNAVAILABLE, "m", status=503)),
        (
            {"message": "m", "type": "x", "code": "model_not_found"},
            StreamError(ErrorKind.NOT_FOUND, "m", "model_not_found", type="x"),
        ),
        ({"detail": [1]}, StreamError(ErrorKind.SERVER, "[1]")),
        ({"odd": 1}, StreamError(ErrorKind.SERVER, '{"odd":1}')),
        ([1, 2], StreamError(ErrorKind.SERVER, "[1,2]")),
    ],
)
def test_an_error_is_read_from_any_shape(value: object, expected: StreamError) -> None:
    assert error_from_wire(value) == expected


# ---- reading


def test_fields_are_read_by_their_types_and_null_means_not_said() -> None:
    fields = read('{"count":2,"flag":null,"points":[{"x":1}],"later":1,"heat":1}')
    assert fields == Fields({"count": 2, "points": [Point(1)], "heat": 1.0}, ("later",))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ('{"count":"2"}', "count", "Invalid value for 'count': expected `int`, got `str`."),
        ('{"count":6}', "count", "Invalid value for 'count': expected `int` <= 5."),
        (
            '{"points":[{"x":1},{"x":null}]}',
            "points[1].x",
            "Invalid value for 'points[1].x': expected `int`, got `null`.",
        ),
        ('{"points":[{}]}', "points[0].x", "Missing required parameter: 'points[0].x'."),
        ('{"sizes":{"a":"b"}}', "sizes[...]", "Invalid value for 'sizes[...]': expected `int`, got `str`."),
        ("[]", None, "The body must be a JSON object."),
        ("3", None, "The body must be a JSON object."),
        ("", None, "The body is not valid JSON: Input data was truncated."),
        ("{", None, "The body is not valid JSON: Input data was truncated."),
        ('{"note":"\\ud800"}', None, "The body escapes a lone surrogate (\\ud800 to \\udfff), which is no character."),
        (
            '{"note":"\\udc00 and more"}',
            None,
            "The body escapes a lone surrogate (\\ud800 to \\udfff), which is no character.",
        ),
        (b'{"note":"\xff"}', None, "The body is not UTF-8 at byte 9."),
        (b"\xef\xbb\xbf{}", None, "The body is not valid JSON: JSON is malformed: invalid character (byte 0)."),
    ],
)
def test_a_bad_body_is_refused_with_the_path(body: str | bytes, param: str | None, message: str) -> None:
    error = refusal(body)
    assert (error.kind, error.param, error.message) == (ErrorKind.INVALID_REQUEST, param, message)
    assert error.code in {"invalid_value", "invalid_json", "missing_required_parameter"}


def test_of_a_member_that_is_repeated_the_last_counts() -> None:
    assert read('{"heat":"warm","note":1,"heat":0.5,"other":2}') == (read('{"heat":0.5,"note":1,"other":2}'))
    assert refusal('{"heat":0.5,"heat":"warm"}').param == "heat"


def test_a_lone_surrogate_is_not_blamed_for_another_fault() -> None:
    assert "lone surrogate" not in refusal('{"note":"\\ud83d\\ude00",}').message


def test_a_number_out_of_range_is_refused() -> None:
    assert refusal('{"heat":1e999}').message == "Invalid value for 'heat': number out of range."


def nested(depth: int) -> str:
    """Make a body of that depth, its own braces counted."""
    return '{"note":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_depth_has_a_limit_and_reaching_it_is_allowed() -> None:
    read(nested(base.MAX_JSON_DEPTH))
    assert refusal(nested(base.MAX_JSON_DEPTH + 1)).code == "json_too_deep"
    assert refusal(nested(100_000)).code == "json_too_deep"
    assert refusal('{"note":' + "[" * 100_000).code == "json_too_deep"


def test_brackets_in_strings_and_side_by_side_are_not_depth() -> None:
    read('{"note":"' + "[" * 1000 + '\\"[[["}')
    read('{"note":[' + "[]," * 1000 + '"{"]}')


def test_an_unbalanced_body_is_called_malformed_and_not_deep() -> None:
    assert refusal('{"note":[' + "[]," * 100).code == "invalid_json"


def test_the_depth_of_an_unterminated_string_is_found_in_linear_work() -> None:
    assert base._STRINGS.sub(b"", b'"' + b'\\"' * 1000) == b""
    assert refusal('{"note":' + "[" * 70 + '"' + '\\"' * 200_000).code == "json_too_deep"


@given(st.recursive(st.integers() | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner)))
def test_what_is_not_deep_is_read_whatever_it_is(value: object) -> None:
    body = json.dumps({"note": value})
    if base._is_too_deep(body.encode()):
        assert body.count("[") + body.count("{") > base.MAX_JSON_DEPTH
    else:
        assert json.dumps(read(body).values.get("note")) == json.dumps(value)


# ---- query


def test_query_texts_become_the_types_of_the_table() -> None:
    assert TABLE.read_query({"count": "3", "flag": "false", "ticket": "t"}).values == {"count": 3, "flag": False}
    with pytest.raises(RequestRefused, match="Invalid value for 'count': expected `int`, got `str`"):
        TABLE.read_query({"count": "x"})


def test_the_body_wins_over_the_query() -> None:
    merged = base.merge_fields(Fields({"a": 1}, ("u",)), Fields({"a": 2, "b": 2}))
    assert merged == Fields({"a": 1, "b": 2}, ("u",))


# ---- policies


@pytest.mark.parametrize(
    ("body", "honoured", "ignored"),
    [
        ('{"count":2}', set[str](), ()),
        ('{"heat":0.5}', set[str](), ("heat",)),
        ('{"heat":0.5}', {"temperature"}, ()),
        ('{"heat":1}', set[str](), ()),
        ('{"note":0,"other":null}', set[str](), ("note", "other")),
        ('{"shape":{"type":"text"}}', set[str](), ()),
        ('{"shape":{"type":"json"}}', {"response_format"}, ()),
    ],
)
def test_what_has_no_effect_is_named(body: str, honoured: set[str], ignored: tuple[str, ...]) -> None:
    assert TABLE.settle(read(body), frozenset(honoured)) == ignored


def test_what_must_be_honoured_and_is_not_is_refused() -> None:
    with pytest.raises(RequestRefused) as refused:
        TABLE.settle(read('{"shape":{"type":"json"}}'), frozenset())
    error = refused.value.error
    assert (error.param, error.code) == ("shape", "unsupported_parameter")
    assert "'shape'" in error.message


def test_names_that_a_client_chose_are_fit_for_a_header() -> None:
    assert base.ignored_names(["a\r\nb, c", "é", "x" * 1000, "a\r\nb, c"]) == ("a??b??c", "?", "x" * 64)
    assert len(base.ignored_names(str(number) for number in range(1000))) == base.MAX_IGNORED_NAMES


# ---- writing


@given(any_text)
def test_escapes_read_back_as_the_text_with_surrogates_repaired(text: str) -> None:
    repaired = base.repair_surrogates(text)
    assert msgspec.json.decode(base.escape_utf8(text)) == repaired
    assert msgspec.json.decode(base.escape_ascii(text)) == repaired
    assert base.escape_ascii(text).isascii()
    assert b"\n" not in base.escape_utf8(text)


@pytest.mark.parametrize(
    ("text", "repaired"), [("\ud800", "\ufffd"), ("a\udc00b", "a\ufffdb"), ("\ud83d\ude00", "😀"), ("é", "é")]
)
def test_surrogates_are_joined_or_replaced(text: str, repaired: str) -> None:
    assert base.repair_surrogates(text) == repaired
    assert base.escape_utf8(text) == base.encode_json(text) == f'"{repaired}"'.encode()
    assert base.escape_ascii(text) == base.encode_json_ascii(text) == json.dumps(repaired).encode()


@given(st.recursive(any_text, lambda inner: st.lists(inner) | st.dictionaries(any_text, inner), max_leaves=5))
def test_json_is_compact_and_says_the_same_in_ascii(value: object) -> None:
    utf8, ascii_ = base.encode_json(value), base.encode_json_ascii(value)
    assert ascii_.isascii()
    assert msgspec.json.decode(utf8) == msgspec.json.decode(ascii_)


def test_ascii_json_escapes_line_ends_that_clients_split_at() -> None:
    assert base.encode_json_ascii({"a": "\u2028😀é"}) == b'{"a":"\\u2028\\ud83d\\ude00\\u00e9"}'


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e9])
def test_a_log_probability_that_json_cannot_say_is_clamped(value: float) -> None:
    assert base.clamp_logprob(value) == base.MIN_LOGPROB
    assert base.clamp_logprob(-0.5) == -0.5


def test_only_a_whole_result_is_a_whole_answer() -> None:
    start = StreamStart("i", "m", 0)
    assert base.finished(Result(start, (), None, StreamEnd())) == (start, UsageReport(0, 0))
    for broken in (Result(None, (), None, StreamEnd()), Result(start, (), None, None)):
        with pytest.raises(LocalProtocolError):
            base.finished(broken)
