"""What the dialects share: the error table, reading requests under one parameter table, and escaping text.

A dialect names its request's fields in a `ParameterTable`. Whether a field is honoured, ignored and named, or refused
is decided there and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from json.encoder import encode_basestring_ascii
from typing import Annotated, Any, Final, NamedTuple, TypedDict

import msgspec

from tokenwire.core.collect import Result
from tokenwire.core.errors import LocalProtocolError, RequestRefused
from tokenwire.core.events import (
    ErrorKind,
    Failure,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    UsageReport,
)
from tokenwire.core.text import repair_surrogates

__all__ = [
    "ERRORS",
    "MAX_CHOICES_REQUESTED",
    "MAX_IGNORED_LENGTH",
    "MAX_IGNORED_NAMES",
    "MAX_JSON_DEPTH",
    "MAX_MESSAGES",
    "MAX_NAME_LENGTH",
    "MAX_STOPS",
    "MAX_STOP_LENGTH",
    "MAX_TOKENS_REQUESTED",
    "MIN_LOGPROB",
    "ErrorRow",
    "Fields",
    "MaxTokens",
    "Name",
    "Parameter",
    "ParameterTable",
    "Penalty",
    "Policy",
    "Seed",
    "StopStrings",
    "Temperature",
    "TopP",
    "clamp_logprob",
    "encode_json",
    "encode_json_ascii",
    "escape_ascii",
    "escape_utf8",
    "escape_valid",
    "failure_of",
    "finished",
    "ignored_names",
    "invalid_request",
    "is_retryable",
    "kind_of_status",
    "merge_fields",
    "missing_parameter",
    "openai_error",
    "repair_surrogates",
    "status_of",
    "type_of",
]

# --------------------------------------------------------------------------------------------------------- limits

MAX_JSON_DEPTH: Final = 64
"""How deep a request's arrays and objects may nest: a tool's JSON Schema needs some 20, a stack overflow thousands."""

MAX_CHOICES_REQUESTED: Final = 16
"""The most choices of one request: each costs what a request costs."""

MAX_STOPS: Final = 16
"""The most stop strings: OpenAI allows 4, others up to 16."""

MAX_STOP_LENGTH: Final = 1024
"""The longest stop string in characters: as much text may have to be held back."""

MAX_MESSAGES: Final = 10_000
"""The most messages of one request; the body's size bounds their text."""

MAX_TOKENS_REQUESTED: Final = 2**31 - 1
"""The largest token limit: what a backend's C integer holds."""

MAX_NAME_LENGTH: Final = 256
"""The longest name of a model or a tool, in characters: it is repeated in every chunk."""

MAX_IGNORED_NAMES: Final = 32
"""The most names of ignored fields that an answer's head lists."""

MAX_IGNORED_LENGTH: Final = 64
"""The longest such name; the client chose it, and it goes into a header."""

MIN_LOGPROB: Final = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's own value."""

_MAX_ECHO: Final = 64

Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
TopP = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
MaxTokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS_REQUESTED)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
_StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = _StopString | Annotated[list[_StopString], msgspec.Meta(max_length=MAX_STOPS)]


# --------------------------------------------------------------------------------------------------------- errors


class ErrorRow(NamedTuple):
    """What a kind of error looks like from outside."""

    status: int
    """The HTTP status of an answer that has not begun."""
    type: str
    """The word that OpenAI-like dialects write into `type`."""
    retryable: bool
    """Whether the same request may succeed later, as a rule; an error can say so for itself."""


ERRORS: Final[Mapping[ErrorKind, ErrorRow]] = {
    ErrorKind.INVALID_REQUEST: ErrorRow(400, "invalid_request_error", retryable=False),
    ErrorKind.AUTHENTICATION: ErrorRow(401, "authentication_error", retryable=False),
    ErrorKind.PERMISSION: ErrorRow(403, "permission_error", retryable=False),
    ErrorKind.NOT_FOUND: ErrorRow(404, "not_found_error", retryable=False),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorRow(405, "invalid_request_error", retryable=False),
    ErrorKind.CONFLICT: ErrorRow(409, "conflict_error", retryable=False),
    ErrorKind.TOO_LARGE: ErrorRow(413, "request_too_large", retryable=False),
    ErrorKind.UNSUPPORTED_MEDIA_TYPE: ErrorRow(415, "invalid_request_error", retryable=False),
    ErrorKind.RATE_LIMIT: ErrorRow(429, "rate_limit_error", retryable=True),
    ErrorKind.SERVER: ErrorRow(500, "server_error", retryable=False),
    ErrorKind.UNAVAILABLE: ErrorRow(503, "service_unavailable", retryable=True),
    ErrorKind.TIMEOUT: ErrorRow(504, "timeout_error", retryable=True),
    ErrorKind.OVERLOADED: ErrorRow(529, "overloaded_error", retryable=True),
}
"""The one table of errors. SERVER is not retryable as a rule: a backend that raised once raises again."""

_BY_STATUS: Final = {row.status: kind for kind, row in ERRORS.items()} | {
    408: ErrorKind.TIMEOUT,
    502: ErrorKind.UNAVAILABLE,
}


def status_of(error: StreamError) -> int:
    """Say with which HTTP status an error is answered.

    Returns:
        The error's own status where that is one of an error, else its kind's.
    """
    status = error.status
    return status if status is not None and 400 <= status <= 599 else ERRORS[error.kind].status


def type_of(error: StreamError) -> str:
    """Say which `type` word an error has in OpenAI-like dialects: its provider's own, or its kind's."""
    return error.type or ERRORS[error.kind].type


def is_retryable(error: StreamError) -> bool:
    """Say whether the same request may succeed later, by the error's own word or by its kind."""
    return error.retryable or ERRORS[error.kind].retryable


def openai_error(error: StreamError) -> dict[str, str | None]:
    """Build OpenAI's error object: four members, all of them always there."""
    return {"message": error.message, "type": type_of(error), "param": error.param, "code": error.code}


def failure_of(terminal: Failure) -> StreamError:
    """Word any unsuccessful end as an error, for dialects that have no other word for it."""
    match terminal:
        case StreamError():
            return terminal
        case StreamTruncated(reason=reason):
            message = f"The stream broke off before it was complete: {reason}"
            return StreamError(ErrorKind.SERVER, message, "stream_truncated", retryable=True)
        case StreamCancelled(by=by):
            return StreamError(ErrorKind.SERVER, f"The stream was cancelled by the {by}.", "cancelled")


def kind_of_status(status: int) -> ErrorKind:
    """Say which kind an error answer's status stands for; what is no status of an error is the server's fault."""
    return _BY_STATUS.get(status, ErrorKind.INVALID_REQUEST if 400 <= status < 500 else ErrorKind.SERVER)


# ------------------------------------------------------------------------------------------------- refused requests


def invalid_request(message: str, param: str | None = None, code: str = "invalid_value") -> RequestRefused:
    """Make the refusal of a request that cannot be served as it is.

    Args:
        message: one sentence for the person who wrote the request.
        param: the field it is about, with its path.
        code: a stable word for programs.
    """
    return RequestRefused(StreamError(ErrorKind.INVALID_REQUEST, message, code, param))


def missing_parameter(param: str) -> RequestRefused:
    """Make the refusal of a request that lacks a field."""
    return invalid_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


_AT = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN_VALUE = re.compile(r"Invalid (?:enum )?value (?P<value>.*)", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


def _refusal(name: str, error: msgspec.ValidationError) -> RequestRefused:
    """Word a value of a wrong type or out of range with the path to it."""
    match = _AT.fullmatch(str(error))
    what, path = (match["what"], match["path"] or "") if match else (str(error), "")
    param = name + path
    if missing := _MISSING.fullmatch(what):
        return missing_parameter(f"{param}.{missing['name']}")
    if unknown := _UNKNOWN_VALUE.fullmatch(what):
        return invalid_request(f"Invalid value for '{param}': {unknown['value'][:_MAX_ECHO]} is not supported.", param)
    return invalid_request(f"Invalid value for '{param}': {what[:1].lower()}{what[1:]}.", param)


# ----------------------------------------------------------------------------------------------------- JSON reading

_BODY_DECODER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL: Final = msgspec.Raw(b"null")
# The closing quote is optional: else each quote in an unterminated string would be tried as a beginning.
_STRINGS: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ROUND: Final = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[{]}")
_SURROGATE_ESCAPE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def _read_object(body: bytes) -> dict[str, msgspec.Raw]:
    """Read a JSON object's members without looking into them.

    Raises:
        RequestRefused: it is not JSON, not UTF-8, not an object, or nests deeper than MAX_JSON_DEPTH.
    """
    if _is_too_deep(body):
        raise _too_deep()
    try:
        body.decode()
        return _BODY_DECODER.decode(body)
    except UnicodeDecodeError as error:
        raise invalid_request(f"The body is not UTF-8 at byte {error.start}.", code="invalid_json") from None
    except msgspec.ValidationError:
        raise invalid_request("The body must be a JSON object.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise _not_json(body, error) from None
    except RecursionError:
        raise _too_deep() from None


def _too_deep() -> RequestRefused:
    return invalid_request(f"The body nests deeper than MAX_JSON_DEPTH={MAX_JSON_DEPTH}.", code="json_too_deep")


def _is_too_deep(body: bytes) -> bool:
    """Say whether brackets outside strings nest deeper than MAX_JSON_DEPTH; linear in the body's length.

    Each round takes away every innermost pair, so that as many rounds empty a body as it is deep.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return False
    brackets = _STRINGS.sub(b"", body).translate(_ROUND, _NO_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):
        if not brackets:
            return False
        brackets = brackets.replace(b"()", b"")
    return b"()" in brackets or brackets.count(b"(") > MAX_JSON_DEPTH


def _not_json(body: bytes, error: msgspec.DecodeError) -> RequestRefused:
    """Word a syntax error; a lone surrogate, which other parsers let through, is named as what it is."""
    if _SURROGATE_ESCAPE.search(body):
        try:
            json.loads(body)
        except ValueError:
            pass  # it has other faults
        else:
            message = "The body escapes a lone surrogate (\\ud800 to \\udfff), which is no character."
            return invalid_request(message, code="invalid_json")
    return invalid_request(f"The body is not valid JSON: {error}.", code="invalid_json")


# ------------------------------------------------------------------------------------------------------- parameters


class Policy(Enum):
    """What becomes of a field that the backend does not act on."""

    HONOURED = "honoured"
    """Nothing: the core or the dialect sees to it."""
    IGNORABLE = "ignorable"
    """It is named in the answer's head."""
    MUST_HONOUR = "must honour"
    """The request is refused: an answer without it would be another answer."""


class Parameter(NamedTuple):
    """One field of a dialect's requests."""

    type: Any
    """What msgspec decodes it to; null need not be in it, for null means that the client did not say."""
    field: str | None = None
    """The field of GenerationRequest that stands for it, or None where nothing does, so that nobody can honour it."""
    policy: Policy = Policy.HONOURED
    """What becomes of it otherwise."""
    default: object = None
    """The value that asks for nothing: it is neither named nor refused."""


class Fields(NamedTuple):
    """A request's fields, read."""

    values: dict[str, Any]
    """Known fields that the client gave, each of its own type."""
    unknown: tuple[str, ...] = ()
    """Names that the table does not have."""


class ParameterTable:
    """The fields of a dialect's requests.

    Args:
        parameters: name on the wire, and what it is.
    """

    __slots__ = ("_decode_known", "_decoders", "_parameters")

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = dict(parameters)
        self._decoders = {name: msgspec.json.Decoder(known.type) for name, known in parameters.items()}
        make: Any = TypedDict  # type checkers know it with a literal only
        known = make("known", {name: known.type | None for name, known in parameters.items()}, total=False)
        self._decode_known: Callable[[bytes], dict[str, Any]] = msgspec.json.Decoder(known).decode

    def read(self, body: bytes) -> Fields:
        """Read a body.

        Raises:
            RequestRefused: it is not a JSON object, or a known field has a wrong type or is out of its range.
        """
        raw = _read_object(body)
        try:
            values = self._decode_known(body)  # all at once; an error is worded by the field that has it
        except (msgspec.DecodeError, RecursionError):
            values = {name: self._decode(name, value) for name, value in raw.items() if name in self._decoders}
        if None in values.values():
            values = {name: value for name, value in values.items() if value is not None}
        if len(values) == len(raw):
            return Fields(values)
        return Fields(values, tuple(name for name in raw if name not in self._decoders))

    def read_query(self, query: Mapping[str, str]) -> Fields:
        """Read query parameters: texts, of which numbers and booleans are made where the table has them.

        Unknown names are passed over without a word: the service has query parameters of its own.

        Raises:
            RequestRefused: a known parameter has a wrong type or is out of its range.
        """
        return Fields({name: self._convert(name, text) for name, text in query.items() if name in self._parameters})

    def settle(self, fields: Fields, honoured: frozenset[str]) -> tuple[str, ...]:
        """Decide about every field that will have no effect.

        Args:
            fields: what was read.
            honoured: names of GenerationRequest's fields that somebody acts on.

        Returns:
            Names to tell the client, fit for a header.

        Raises:
            RequestRefused: a field must be honoured and will not be.
        """
        ignored: list[str] = []
        for name, value in fields.values.items():
            known = self._parameters[name]
            if known.policy is Policy.HONOURED or known.field in honoured or value == known.default:
                continue
            if known.policy is Policy.MUST_HONOUR:
                message = f"Unsupported parameter: '{name}' cannot be honoured by this model."
                raise invalid_request(message, name, "unsupported_parameter")
            ignored.append(name)
        return ignored_names((*ignored, *fields.unknown)) if ignored or fields.unknown else ()

    def _decode(self, name: str, raw: msgspec.Raw) -> Any:
        if raw == _NULL:
            return None
        try:
            return self._decoders[name].decode(raw)
        except msgspec.ValidationError as error:
            raise _refusal(name, error) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise invalid_request(f"Invalid value for '{name}': {error}.", name) from None

    def _convert(self, name: str, text: str) -> Any:
        try:
            return msgspec.convert(text, self._parameters[name].type, strict=False)
        except msgspec.ValidationError as error:
            raise _refusal(name, error) from None


def merge_fields(body: Fields, query: Fields) -> Fields:
    """Put a body's fields over a query's."""
    return Fields(query.values | body.values, body.unknown + query.unknown)


def ignored_names(names: Iterable[str]) -> tuple[str, ...]:
    """Make names that a client chose fit for a header: bounded in number and length, ASCII, without separators."""
    unique = dict.fromkeys(re.sub(r"[^A-Za-z0-9_.\-]", "?", name[:MAX_IGNORED_LENGTH]) for name in names)
    return tuple(unique)[:MAX_IGNORED_NAMES]


# ---------------------------------------------------------------------------------------------------------- writing

_encode: Final = msgspec.json.Encoder().encode
_NON_ASCII: Final = re.compile(r"[^\x00-\x7f]+")
_search_surrogate: Final = re.compile("[\ud800-\udfff]").search


escape_valid: Final[Callable[[str], bytes]] = _encode
"""Makes text a JSON string with its quotes, in raw UTF-8; raises UnicodeEncodeError for surrogates.

msgspec's own C function, for a `Template`, whose text has been repaired: no Python call a token."""


def escape_utf8(text: str) -> bytes:
    """Make text a JSON string with its quotes, in raw UTF-8; lone surrogates become U+FFFD."""
    try:
        return _encode(text)
    except UnicodeEncodeError:
        return _encode(repair_surrogates(text))


def escape_ascii(text: str) -> bytes:
    """Make text a JSON string with its quotes, in ASCII; lone surrogates become U+FFFD.

    For dialects whose clients take U+2028, U+2029 or U+0085 for a line's end.
    """
    if text.isascii():
        return _encode(text)
    escaped = encode_basestring_ascii(text)
    # Only what has surrogates, or needs pairs of them, is escaped so: the usual text is not searched.
    if "\\ud" in escaped and _search_surrogate(text) is not None:
        escaped = encode_basestring_ascii(repair_surrogates(text))
    return escaped.encode()


def encode_json(value: object) -> bytes:
    """Write a value as compact JSON in raw UTF-8; lone surrogates become U+FFFD."""
    try:
        return _encode(value)
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False, separators=(",", ":"))
        return repair_surrogates(text).encode()


def encode_json_ascii(value: object) -> bytes:
    """Write a value as compact JSON in ASCII; lone surrogates become U+FFFD."""
    data = encode_json(value)
    if data.isascii():
        return data
    # Outside its strings JSON is ASCII, so that every other character is inside one and may be escaped.
    return _NON_ASCII.sub(lambda match: encode_basestring_ascii(match[0])[1:-1], data.decode()).encode()


def clamp_logprob(value: float) -> float:
    """Make a log probability one that JSON can say: minus infinity and NaN become MIN_LOGPROB."""
    return max(MIN_LOGPROB, value)  # in this order NaN loses, for no comparison with it is true


def finished(result: Result) -> tuple[StreamStart, UsageReport]:
    """Check that a result is whole, and give its envelope and its usage.

    Raises:
        LocalProtocolError: it failed or is not complete; such a result is answered with an error.
    """
    if result.start is None or not isinstance(result.terminal, StreamEnd):
        raise LocalProtocolError(f"a result that ended with {result.terminal!r} is no whole answer")
    return result.start, result.usage or UsageReport(0, 0)
