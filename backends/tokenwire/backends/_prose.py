"""The text that the mock backend says: a few passages, cut into tokens once, as events that all streams share."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Final

from tokenwire.core.events import TextDelta

__all__ = ["STARTS", "TOKENS", "TURN", "sentence_end"]

_TEXT: Final = """\
The lighthouse keeper wrote down the weather every hour, though nobody had asked for it in years. Wind from the west,
he wrote, and a sea like hammered tin. On clear nights he counted the ships — eleven was his record — and gave each of
them a name, because a light that is seen by strangers ought at least to know whom it greets. His daughter said that
this was a kind of prayer. He said it was a kind of bookkeeping. In spring the inspectors came with a lamp that needed
no keeper at all. They were polite about it. He showed them the ledgers, forty of them, and the youngest inspector sat
down on the stairs and read until the tide had turned.

Bread begins with patience and a little arithmetic. Take five parts of flour to three of water, and salt enough that
you would notice if it were missing. Mix them badly and go away. Time does the kneading that your arms were planning
to do, and it never gets tired. When you come back the dough will have opinions: it will be smooth where it was rough,
and it will spring back when you press it. Fold it over itself four times, as if you were putting a letter into an
envelope. Bake it hotter than seems wise. The crust should sing when it meets the cold air, a small crackling sound,
and if you are quick you can hear it before the children do.

At the corner of the square there is a café where the clock has been wrong since the flood. Regulars arrive by it all
the same. Señora Muñoz takes the table by the window and orders a crème brûlée that she never finishes; the professor,
naïve about everything but beetles, reads the paper from back to front. “It ends better that way,” he says. Rain costs
nothing here and gossip costs a coffee. When the power fails, which is often, somebody fetches candles and the whole
room lowers its voice, as though the dark were a guest who had travelled a long way and must not be startled.

The night train to 京都 leaves from the quiet end of the station. She had learned three words of the language and used
them all before boarding: ありがとう to the porter, すみません to the man whose foot she had found, and, since one must
practise, 日本 to nobody at all. The compartment smelled of oranges. Across from her a boy was drawing bridges in a
school notebook, one on every page, each a little longer than the last. He tore one out and gave it to her without a
word. Years later it hung above her desk at the engineering office, and visitors would ask who had designed it. A
colleague, she would say. We met on a train.

Every garden is an argument with the weather, and most gardeners lose it cheerfully 🌱. The tomatoes sulked until
August and then all spoke at once 🍅. The beans climbed past the end of their poles and went on, out of habit, into the
neighbour's washing. You learn to take notes: what was sown, what came up, what the snails thought of it. You learn
that 20 °C in May is a promise and 20 °C in October is a gift. In the evening 👩🏽‍🌾 the watering cans go round once
more, slowly, since nobody wants to be the first to go inside. There is always one more row. There is always, come to
that, one more year.
"""

_BREAK: Final = "\n\n"


def _cut(passage: str) -> list[str]:
    """Cut a passage into words, each with the space before it, as a model's tokens are."""
    return re.findall(r" ?\S+", " ".join(passage.split()))


_PIECES: Final = [[*_cut(passage), _BREAK] for passage in _TEXT.split(_BREAK)]

STARTS: Final = tuple(accumulate((len(pieces) for pieces in _PIECES[:-1]), initial=0))
"""Where in TOKENS each passage begins."""

TURN: Final = sum(len(pieces) for pieces in _PIECES)
"""How many tokens there are before the passages come round again."""

TOKENS: Final = tuple((TextDelta(piece),) for pieces in _PIECES * 2 for piece in pieces)
"""The passages twice in a row, so that a text may begin at any of them; each token is a run of one event."""

_ENDS: Final = tuple(at for at, (token,) in enumerate(TOKENS, 1) if token.text.rstrip("”").endswith("."))


def sentence_end(at: int) -> int:
    """Find the first place at or after `at` where a sentence ends, or the last of all."""
    return next((end for end in _ENDS if end >= at), _ENDS[-1])
