"""Reading other servers' errors: error objects of any dialect, in a stream or instead of one, proxies' pages, nothing.

What they say is bounded and on one line, for it is logged and passed on.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from tokenwire.core.events import ErrorKind, StreamError

from .base import ERRORS, encode_json, kind_of_status

__all__ = [
    "MAX_ERROR_BODY",
    "MAX_ERROR_MESSAGE",
    "MAX_ERROR_WORD",
    "error_from_body",
    "error_from_value",
    "error_from_wire",
    "error_without_chunk",
    "is_cut_json",
    "malformed_answer",
    "one_line",
]

MAX_ERROR_BODY: Final = 64 * 1024
"""How many bytes of an error's body are looked at: a provider's are some hundred, a page's beginning tells enough."""

MAX_ERROR_MESSAGE: Final = 4096
"""The most characters of another server's error message that are kept: it is logged and passed on."""

MAX_ERROR_WORD: Final = 256
"""The most characters of its code, its type and its parameter's name."""

_MAX_WRAPPERS: Final = 4
"""How many lists and `error` members an error may be wrapped in."""

_BY_WORD: Final[Mapping[str, ErrorKind]] = {ERRORS[kind].type: kind for kind in reversed(ErrorKind)} | {
    "api_error": ErrorKind.SERVER,
    "context_length_exceeded": ErrorKind.INVALID_REQUEST,
    "insufficient_quota": ErrorKind.RATE_LIMIT,
    "internal_error": ErrorKind.SERVER,
    "internal_server_error": ErrorKind.SERVER,
    "invalid_api_key": ErrorKind.AUTHENTICATION,
    "model_not_found": ErrorKind.NOT_FOUND,
    "overloaded": ErrorKind.OVERLOADED,
    "rate_limit_exceeded": ErrorKind.RATE_LIMIT,
    "timeout": ErrorKind.TIMEOUT,
}

# No tag holds another: else each of many tags that never end would be read to the end of the page.
_TITLE: Final = re.compile("<title[^<>]*>([^<]*)", re.IGNORECASE)
_TAG: Final = re.compile("<[^<>]*>")
_SPACES: Final = re.compile(r"\s+")


def error_from_wire(value: object, kind: ErrorKind | None = None) -> StreamError:
    """Read an error object of any shape, as servers send it beside or instead of a stream's chunks.

    Args:
        value: what the `error` member held: an object with any members, or a plain text.
        kind: its kind where an HTTP status has said it; else its code, its type and its number do.
    """
    members = cast("dict[str, Any]", value) if isinstance(value, dict) else {"message": value}
    code, param, state = members.get("code"), members.get("param"), members.get("status")
    word = members.get("type") or members.get("error_type") or state
    status = _status_number(code, state)
    kind = kind or _kind_of(code, word, status)
    return StreamError(
        kind,
        one_line(_message_of(members), MAX_ERROR_MESSAGE),
        None if code is None else one_line(_text(code), MAX_ERROR_WORD),
        None if param is None else one_line(_text(param), MAX_ERROR_WORD),
        status,
        retryable=members.get("retryable") is True,
        type=one_line(word, MAX_ERROR_WORD) if isinstance(word, str) and _is_own_word(word, kind) else None,
    )


def error_from_body(status: int, body: bytes) -> StreamError:
    """Read an error answer's body; see `contracts.Dialect.decode_error`.

    OpenAI's error object is read, and with the same table what others send in its place: Anthropic's, Google's in a
    list of one, FastAPI's `detail`, a bare text under `error`.
    """
    is_error = 400 <= status <= 599
    kind = kind_of_status(status)
    error = _error_object(body, kind if is_error else None)
    if error is None:
        error = StreamError(kind, _message_of_text(status, body))
    if not is_error:
        return error
    return msgspec.structs.replace(error, status=None if ERRORS[kind].status == status else status)


def error_from_value(value: object, kind: ErrorKind | None = None) -> StreamError | None:
    """Read a decoded JSON value that stands where an error is expected, unwrapped from lists and `error` members.

    Args:
        value: the value.
        kind: the error's kind where an HTTP status has said it.

    Returns:
        The error, or None where the value says nothing: null, and empty text, objects and lists.
    """
    for _ in range(_MAX_WRAPPERS):
        inner = _unwrap(value)
        if inner is value:
            break
        value = inner
    return error_from_wire(value, kind) if value else None


def error_without_chunk(data: str | bytes) -> StreamError | None:
    """Read an object that came in the place of a chunk and is no chunk, and no error object either.

    vLLM wrote its error flat, with `object` to tell; MiniMax has a `base_resp` with a number that is 0 where all is well;
    gateways write a message beside a number or a sort.

    Returns:
        The error, or None where it is something else.
    """
    members = _members(data)
    response = members.get("base_resp")
    if isinstance(response, dict):
        base = cast("dict[str, Any]", response)
        said = {"message": base.get("status_msg") or "The server gave no reason.", "code": base.get("status_code")}
        return error_from_wire(said) if said["code"] else None
    is_flat = isinstance(members.get("message"), str) and any(members.get(name) for name in _MARKS)
    return error_from_wire(members) if members.get("object") == "error" or is_flat else None


_MARKS: Final = ("code", "type", "status", "statusCode")
"""What is beside a message that is an error's."""


def _members(data: str | bytes) -> dict[str, Any]:
    try:
        value: object = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _unwrap(value: object) -> object:
    if isinstance(value, list):
        items = cast("list[object]", value)
        return items[0] if items else None
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        inner: object = members.get("error") or members.get("errors")
        if isinstance(inner, dict | list):  # a text has its message, its code and its type beside it
            return cast("object", inner)
        return members
    return value


def _error_object(body: bytes, kind: ErrorKind | None) -> StreamError | None:
    if len(body) > MAX_ERROR_BODY:
        return None
    try:
        return error_from_value(msgspec.json.decode(body.removeprefix(b"\xef\xbb\xbf")), kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _message_of_text(status: int, body: bytes) -> str:
    text = body[:MAX_ERROR_BODY].decode("utf-8", "replace").removeprefix("\ufeff").strip()
    if text.startswith("<"):
        title = _TITLE.search(text)
        text = html.unescape(title[1] if title and title[1].strip() else _TAG.sub(" ", text))
    shown = one_line(_SPACES.sub(" ", text), MAX_ERROR_MESSAGE)
    return f"The server answered with status {status}{f': {shown}' if shown else ' and said nothing about it.'}"


def one_line(text: str, limit: int) -> str:
    """Make another server's text safe to log and to pass on.

    Args:
        text: any text.
        limit: the most characters that are kept; an ellipsis shows that there were more.

    Returns:
        The text on one line: a space for each run of controls, of line ends and of marks that turn the writing's
        direction; without space around it.
    """
    shown = _UNSAFE.sub(" ", text[: limit + 1]).strip()
    return shown if len(text) <= limit else f"{shown[: limit - 1]}…"


_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def _is_own_word(word: str, kind: ErrorKind) -> bool:
    return bool(word) and word != ERRORS[kind].type and not re.fullmatch("[0-9]*", word)


def _status_number(*candidates: object) -> int | None:
    """Find an HTTP status among members that hold a number, or a number as text."""
    for value in candidates:
        number = int(value) if isinstance(value, str) and re.fullmatch("[45][0-9]{2}", value) else value
        if isinstance(number, int) and 400 <= number <= 599:
            return number
    return None


def _kind_of(code: object, word: object, status: int | None) -> ErrorKind:
    for name in (code, word):
        if isinstance(name, str) and name in _BY_WORD:
            return _BY_WORD[name]
    return ErrorKind.SERVER if status is None else kind_of_status(status)


def _message_of(members: dict[str, Any]) -> str:
    for name in ("message", "error", "detail"):
        if members.get(name):
            return _text(members[name])
    return _text(members)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return encode_json(value).decode()
    except RecursionError:
        return "an error that nests too deep to be shown"


def is_cut_json(error: BaseException) -> bool:
    """Say whether JSON could not be read because it ends too early."""
    return "truncated" in str(error)  # msgspec has a word for it, and no class


def malformed_answer(what: str) -> StreamError:
    """Make the error of an answer that is neither whole nor an error."""
    return StreamError(ErrorKind.SERVER, f"The server sent a malformed answer: {what}", "malformed_answer")
