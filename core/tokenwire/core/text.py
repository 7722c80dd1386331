"""Text from a model's tokens: whole characters from bytes and surrogates, and stop strings across token borders."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Scan", "StopScanner", "Utf8Assembler", "has_surrogates", "repair_surrogates"]

_search_surrogate = re.compile("[\ud800-\udfff]").search


def has_surrogates(text: str) -> bool:
    """Says whether a surrogate stands in the text: such text has no UTF-8."""
    return not text.isascii() and _search_surrogate(text) is not None


def repair_surrogates(text: str) -> str:
    """Joins surrogates that are pairs and replaces those that are alone with U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Utf8Assembler:
    """Makes text of pieces that are cut anywhere, also inside a character.

    Only the incomplete end of a piece is held. What can never become a character is replaced as soon as that is known:
    one U+FFFD per maximal subpart (Unicode 3.9, as in WHATWG Encoding), so the result is that of decoding the whole.

    Bytes and str may alternate. A character does not go across such a change: what is held is replaced.
    """

    __slots__ = ("_bytes", "_surrogate")

    def __init__(self) -> None:
        self._bytes = b""  # the beginning of a UTF-8 sequence, at most 3 bytes
        self._surrogate = ""  # a high surrogate or nothing

    @property
    def holds(self) -> bool:
        """Whether a piece of a character is held."""
        return bool(self._bytes or self._surrogate)

    def receive_data(self, data: bytes) -> str:
        """Takes bytes of UTF-8 and gives the text that is whole.

        Args:
            data: bytes, cut anywhere; empty bytes mean nothing.

        Returns:
            Text without surrogates. The beginning of a character at its end is held.
        """
        if not self._bytes and not self._surrogate:
            try:
                return data.decode()
            except UnicodeDecodeError:
                pass  # incomplete or invalid
        return self._decode(data) if data else ""

    def repair(self, text: str) -> str:
        """Takes text in which surrogates may stand, and gives it without them.

        Args:
            text: a piece of text, cut anywhere; empty text means nothing.

        Returns:
            The text with pairs joined, also across pieces, and lone surrogates replaced. A high surrogate at its end is
            held.
        """
        if not self._bytes and not self._surrogate and not has_surrogates(text):
            return text
        return self._join(text) if text else ""

    def flush(self) -> str:
        """Gives what is held, replaced, at the end of the text. The assembler is as new afterwards."""
        rest = self._bytes.decode("utf-8", "replace") or ("\ufffd" if self._surrogate else "")
        self._bytes = b""
        self._surrogate = ""
        return rest

    def _decode(self, data: bytes) -> str:
        before = self.flush() if self._surrogate else ""
        data = self._bytes + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._bytes = data[used:]
        return before + text

    def _join(self, text: str) -> str:
        before = self.flush() if self._bytes else ""
        text = self._surrogate + text
        self._surrogate = ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._surrogate = text[:-1], text[-1]
        # UTF-16 is where surrogates are at home: its decoder joins pairs and replaces what is alone.
        return before + text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Scan(msgspec.Struct, frozen=True, gc=False):
    """What a scan of one piece of text found."""

    text: str
    """What may be released now."""
    stop: str | None
    """The stop string that ended the text; None while it goes on."""


class StopScanner:
    """Finds the first of several stop strings in text that comes in pieces, holding back no more than it must.

    The stop string that ends first wins; of several that end there, the longest. Nothing of it and nothing after it is
    ever released. Held back is exactly the longest end of the text that may still become the winner.

    It is an Aho-Corasick automaton: its state is that longest end, as a node of the tree of all stop strings, so the
    work is linear in the text for any number of them. How many there may be is for the request's limits to say.

    Args:
        stops: the stop strings, in any order; none at all is allowed.

    Raises:
        ValueError: a stop string is empty.
        TypeError: stops is a str, which would mean each of its characters.
    """

    __slots__ = ("_depths", "_fallbacks", "_held", "_next", "_search", "_state", "_stop", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        live = _live_stops(stops)
        firsts = "".join(re.escape(first) for first in dict.fromkeys(stop[0] for stop in live))
        # Finds where a stop string may begin. "(?!)" matches nowhere.
        self._search = re.compile(f"[{firsts}]" if live else "(?!)").search
        self._next: list[dict[str, int]] = [{}]
        self._depths = [0]
        self._stops: list[str | None] = [None]
        for stop in live:
            self._plant(stop)
        self._fallbacks = [0] * len(self._next)
        self._link()
        self._state = 0
        self._held = ""
        self._stop: str | None = None

    def scan(self, text: str) -> Scan:
        """Takes a piece of text and gives what may be released.

        Args:
            text: the piece; empty text means nothing.

        Returns:
            The text to release, and the stop string once one was found. After that, every scan releases nothing and
            names the same stop string.
        """
        if not self._held and self._stop is None and self._search(text) is None:
            return Scan(text, None)
        return self._walk(text)

    def flush(self) -> str:
        """Gives the text that is held back, at every kind of end of the text; "" after a stop string was found.

        Nothing is held back afterwards, and the next scan begins a new text unless a stop string was found.
        """
        rest, self._held = self._held, ""
        self._state = 0
        return rest

    def _walk(self, text: str) -> Scan:
        if self._stop is not None:
            return Scan("", self._stop)
        at = len(self._held)
        text = self._held + text
        state = self._state
        while at < len(text):
            if not state:
                candidate = self._search(text, at)
                if candidate is None:
                    break
                at = candidate.start()
            state = self._step(state, text[at])
            at += 1
            stop = self._stops[state]
            if stop is not None:
                self._stop, self._held = stop, ""
                return Scan(text[: at - len(stop)], stop)
        self._state = state
        cut = len(text) - self._depths[state]
        self._held = text[cut:]
        return Scan(text[:cut], None)

    def _step(self, state: int, character: str) -> int:
        """Goes to the node of the longest end of the text that begins a stop string."""
        while True:
            following = self._next[state].get(character)
            if following is not None:
                return following
            if not state:
                return 0
            state = self._fallbacks[state]

    def _plant(self, stop: str) -> None:
        node = 0
        for depth, character in enumerate(stop, 1):
            following = self._next[node].get(character)
            if following is None:
                following = self._next[node][character] = len(self._next)
                self._next.append({})
                self._depths.append(depth)
                self._stops.append(None)
            node = following
        self._stops[node] = stop

    def _link(self) -> None:
        """Gives each node, shallow ones first, the node of its longest proper end.

        No stop string needs handing down such a link: one that ended inside another would have made that one dead.
        """
        level = list(self._next[0].values())
        while level:
            below: list[int] = []
            for node in level:
                for character, child in self._next[node].items():
                    self._fallbacks[child] = self._step(self._fallbacks[node], character)
                    below.append(child)
            level = below


def _live_stops(stops: Sequence[str]) -> list[str]:
    """Leaves out every stop string that cannot win, for another one inside it ends before it does."""
    if isinstance(stops, str):
        raise TypeError("stops is a str: give a sequence of stop strings")
    if "" in stops:
        raise ValueError("a stop string is empty")
    return [stop for stop in dict.fromkeys(stops) if not any(other in stop[:-1] for other in stops)]
