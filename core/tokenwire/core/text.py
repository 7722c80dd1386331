"""Text from a model's tokens: whole characters from bytes and surrogates, and stop strings across token borders."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["StopScanner", "Utf8Assembler", "has_surrogates", "repair_surrogates"]

_search_surrogate = re.compile("[\ud800-\udfff]").search


def has_surrogates(text: str) -> bool:
    """Says whether a surrogate stands in the text: such text has no UTF-8."""
    return not text.isascii() and _search_surrogate(text) is not None


def repair_surrogates(text: str) -> str:
    """Joins surrogates that are pairs and replaces those that are alone with U+FFFD."""
    # UTF-16 is where surrogates are at home: its decoder joins pairs and replaces what is alone.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Utf8Assembler:
    """Makes text of pieces that are cut anywhere, also inside a character.

    Only the incomplete end of a piece is held. What can never become a character is replaced as soon as that is known:
    one U+FFFD per maximal subpart (Unicode 3.9, as in WHATWG Encoding), so the result is that of decoding the whole.

    Bytes and str may alternate. A character does not go across such a change: what is held is replaced.

    Attributes:
        invalid: whether something was replaced because nothing that follows could have made it whole. What only the
            end of the text cuts off, which `holds` tells before `flush` replaces it, is truncated and not invalid.
    """

    __slots__ = ("_held", "invalid")

    def __init__(self) -> None:
        self._held: bytes | str = b""  # the beginning of a UTF-8 sequence, at most 3 bytes, or a high surrogate
        self.invalid = False

    @property
    def holds(self) -> bool:
        """Whether a piece of a character is held."""
        return bool(self._held)

    def receive_data(self, data: bytes) -> str:
        """Takes bytes of UTF-8 and gives the text that is whole.

        Args:
            data: bytes, cut anywhere; empty bytes mean nothing.

        Returns:
            Text without surrogates. The beginning of a character at its end is held.
        """
        if not self._held:
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
        if not self._held and not has_surrogates(text):
            return text
        return self._join(text) if text else ""

    def flush(self) -> str:
        """Gives what is held, replaced, at the end of the text. Nothing is held afterwards."""
        held, self._held = self._held, b""
        return "\ufffd" if held else ""

    def _decode(self, data: bytes) -> str:
        before = ""
        if isinstance(self._held, str):
            before = self._give_up()
        else:
            data = self._held + data
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            self.invalid = True
            text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return before + text

    def _join(self, text: str) -> str:
        before = ""
        if isinstance(self._held, bytes):
            before = self._give_up()
        else:
            text = self._held + text
        self._held = ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._held = text[:-1], text[-1]
        repaired = repair_surrogates(text)
        self.invalid = self.invalid or repaired.count("\ufffd") > text.count("\ufffd")
        return before + repaired

    def _give_up(self) -> str:
        """Replaces what is held, because what comes now is of the other kind."""
        self.invalid = self.invalid or self.holds
        return self.flush()


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

    Attributes:
        stop: the stop string that ended the text; None while it goes on.
    """

    __slots__ = ("_depths", "_fallbacks", "_held", "_must_walk", "_next", "_search", "_state", "_stops", "stop")

    def __init__(self, stops: Sequence[str]) -> None:
        live = _live_stops(stops)
        firsts = "".join(re.escape(first) for first in dict.fromkeys(stop[0] for stop in live))
        # Finds where a stop string may begin: nowhere, where there is none.
        self._search = re.compile(f"[{firsts}]" if live else r"[^\s\S]").search
        self._next: list[dict[str, int]] = [{}]
        self._depths = [0]
        self._stops: list[str | None] = [None]
        for stop in live:
            self._plant(stop)
        self._fallbacks = [0] * len(self._next)
        self._link()
        self._state = 0
        self._held: str = ""
        self._must_walk = False  # something is held, or a stop string was found
        self.stop: str | None = None

    def scan(self, text: str) -> str:
        """Takes a piece of text and gives what may be released; sets `stop` where a stop string ends in it.

        Args:
            text: the piece; empty text means nothing.

        Returns:
            The text to release. After a stop string was found, every scan releases nothing.
        """
        if self._must_walk or self._search(text):
            return self._walk(text)
        return text

    def flush(self) -> str:
        """Gives the text that is held back, at every kind of end of the text; "" after a stop string was found.

        Nothing is held back afterwards, and the next scan begins a new text unless a stop string was found.
        """
        rest, self._held = self._held, ""
        self._state = 0
        self._must_walk = self.stop is not None
        return rest

    def _walk(self, text: str) -> str:
        if self.stop is not None:
            return ""
        at = len(self._held)
        text = self._held + text
        state = self._state
        while at < len(text):
            if not state:
                candidate = self._search(text, at)
                if candidate is None:
                    break
                at = candidate.start()
            character = text[at]
            following = self._next[state].get(character)
            state = self._fall(state, character) if following is None else following
            at += 1
            stop = self._stops[state]
            if stop is not None:
                self.stop = stop
                self._held = ""
                self._must_walk = True
                return text[: at - len(stop)]
        self._state = state
        cut = len(text) - self._depths[state]
        self._held = text[cut:]
        self._must_walk = state != 0
        return text[:cut]

    def _fall(self, state: int, character: str) -> int:
        """Goes to the node of the longest shorter end of the text that begins a stop string."""
        while state:
            state = self._fallbacks[state]
            following = self._next[state].get(character)
            if following is not None:
                return following
        return 0

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
                    self._fallbacks[child] = self._fall(node, character)
                    below.append(child)
            level = below


def _live_stops(stops: Sequence[str]) -> list[str]:
    """Leaves out every stop string that cannot win, for another one inside it ends before it does."""
    if isinstance(stops, str):
        raise TypeError("stops is a str: give a sequence of stop strings")
    if "" in stops:
        raise ValueError("a stop string is empty")
    return [stop for stop in dict.fromkeys(stops) if not any(other in stop[:-1] for other in stops)]
