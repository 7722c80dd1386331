"""Newline-delimited JSON: one value a line, LF only, both ways."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from .errors import MalformedData
from .lines import DEFAULT_MAX_LINE_BYTES, LfSplitter, LineDecoder

__all__ = ["Decoder", "encode"]

_ENCODER = msgspec.json.Encoder()
_JSON_SPACE = b" \t\r"

T = TypeVar("T")


def encode(value: object) -> bytes:
    """Encodes one value as one line, in raw UTF-8.

    Some clients split lines where Python's str does (U+2028, U+0085); a dialect that serves them escapes its text itself.

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

    Cutting the input differently changes neither the values nor the error nor their order: when one read completes
    values and then breaks a rule, the values are returned and the next call, whichever it is, raises the error. An
    error closes the decoder: what it holds is dropped, `receive_data` raises LocalProtocolError from then on,
    `receive_eof` returns nothing, and `truncated` is True because what follows the fault is never read.

    Args:
        type: the type of the values, as msgspec takes it.
        max_line_bytes: the longest line, without its LF.
    """

    __slots__ = ("_decoder", "_line_number")

    def __init__(self, type: type[T], *, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES) -> None:
        super().__init__(LfSplitter(max_line_bytes=max_line_bytes))
        self._decoder = msgspec.json.Decoder(type)
        self._line_number = 0

    def receive_data(self, data: bytes) -> list[T]:
        """Takes bytes and gives the values of the lines that they complete.

        Args:
            data: bytes as they came, cut anywhere; empty bytes mean nothing.

        Returns:
            The values that are complete now, in order.

        Raises:
            LimitExceeded: a line is too long. The decoder is closed.
            MalformedData: a line is not JSON, or not JSON of the type; the message has its number, from 1. The decoder
                is closed.
            LocalProtocolError: data after the end of input or after an error. The decoder stays closed.
        """
        return super().receive_data(data)

    def receive_eof(self) -> list[T]:
        """Takes the end of input. It may be called again and then does nothing.

        A last line without LF counts when it is a whole value of the type. A bare number does not: no byte shows that
        it was not cut. What does not count sets `truncated`.

        Returns:
            The value of such a last line.

        Raises:
            LimitExceeded, MalformedData: the error of an earlier read that returned values first. The decoder is closed.
        """
        return super().receive_eof()

    def _take_lines(self, lines: list[bytes], items: list[T]) -> None:
        for line in lines:
            self._line_number += 1
            if line.strip(_JSON_SPACE):
                items.append(self._decode(line))

    def _take_rest(self, items: list[T]) -> bool:
        rest = self._lines.take_rest()
        if not rest.strip(_JSON_SPACE):
            return False
        self._line_number += 1
        try:
            value = self._decode(rest)
        except MalformedData:
            return True
        if rest[-1:].isdigit():
            return True
        items.append(value)
        return False

    def _decode(self, line: bytes) -> T:
        """Decodes one line; what msgspec raises for bytes that are not what they should be becomes our error."""
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8"
            raise MalformedData(f"line {self._line_number}: {reason}") from error
        except RecursionError:
            raise MalformedData(f"line {self._line_number}: nested too deep") from None
