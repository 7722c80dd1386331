"""Newline-delimited JSON: one value a line, LF only, both ways."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from .errors import MalformedData
from .lines import DEFAULT_MAX_ITEMS_PER_CALL, DEFAULT_MAX_LINE_BYTES, LfSplitter, LineDecoder

__all__ = ["Decoder", "encode"]

_ENCODER = msgspec.json.Encoder()
_JSON_SPACE = b" \t\r"

T = TypeVar("T")


def encode(value: object) -> bytes:
    """Encodes one value as one line, in raw UTF-8.

    Some clients split lines where Python's str does (U+2028, U+0085); a dialect that serves them escapes its text.

    Args:
        value: anything that msgspec encodes.

    Returns:
        The line with its LF.

    Raises:
        ValueError: ready-made JSON (msgspec.Raw) in the value has an LF; text in it has a lone surrogate (then it is a
            UnicodeEncodeError).
        TypeError: msgspec does not encode the value.
        RecursionError: the value is nested too deep.
    """
    line = _ENCODER.encode(value)
    if b"\n" in line:
        raise ValueError("ready-made JSON has an LF")
    return line + b"\n"


class Decoder(LineDecoder[T], Generic[T]):
    """Decodes lines of JSON into values of one type. Lines of nothing but white space are skipped.

    A line that is not JSON, or not JSON of the type, is MalformedData whose message begins with its number, from 1.

    At the end of input a last line without LF counts when it is a whole value of the type. A bare number does not, for
    no byte shows that it was not cut. What does not count sets `truncated`.

    Cutting the input differently changes neither the values nor the error nor their order: when one read completes
    values and then breaks a rule, the values are returned and the next call, whichever it is, raises the error. An
    error closes the decoder: what it holds is dropped, `receive_data` raises LocalProtocolError from then on,
    `receive_eof` returns nothing, and `truncated` is True because what follows the fault is never read.

    Args:
        type: the type of the values, as msgspec takes it.
        max_line_bytes: the longest line, without its LF.
        max_items_per_call: the most values that one call may give.
    """

    __slots__ = ("_decoder", "_line_number")

    def __init__(
        self,
        type: type[T],
        *,
        max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
        max_items_per_call: int = DEFAULT_MAX_ITEMS_PER_CALL,
    ) -> None:
        super().__init__(LfSplitter(max_line_bytes=max_line_bytes), max_items_per_call)
        self._decoder = msgspec.json.Decoder(type)
        self._line_number = 0

    def _take_lines(self, lines: list[bytes], items: list[T]) -> None:
        for line in lines:
            self._line_number += 1
            if line.strip(_JSON_SPACE):
                self._add(self._decode(line), items)

    def _take_rest(self) -> tuple[list[T], bool]:
        rest = self._lines.take_rest()
        values: list[T] = []
        if rest[-1:].isdigit():
            return values, True
        try:
            self._take_lines([rest], values)
        except MalformedData:
            return values, True
        return values, False

    def _decode(self, line: bytes) -> T:
        """Decodes one line; what msgspec raises for bytes that are not what they should be becomes our error."""
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8"
            raise MalformedData(f"line {self._line_number}: {reason}") from error
        except RecursionError:
            raise MalformedData(f"line {self._line_number}: nested too deep") from None
