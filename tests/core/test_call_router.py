"""Which tool call a fragment belongs to."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import splits, texts

from tokenwire.core.collect import Collector
from tokenwire.core.dialects import openai_chat
from tokenwire.core.dialects._call_router import CallRouter
from tokenwire.core.errors import MalformedData
from tokenwire.core.request import ToolCall
from tokenwire.core.states import MAX_CALLS


class Fragment(NamedTuple):
    """What one fragment says."""

    call_id: str = ""
    position: int | None = None
    name: str = ""
    arguments: str = ""


def numbers(*fragments: Fragment) -> list[int]:
    router = CallRouter()
    return [router.route(*fragment).number for fragment in fragments]


F = Fragment
ROUTES: dict[str, tuple[list[Fragment], list[int]]] = {
    "a known id wins over the index": ([F("x", 0, "f"), F("y", 1, "f"), F("x", 1)], [0, 1, 0]),
    "a new id with a name opens a call on a taken index": ([F("x", 0, "f"), F("y", 0, "f"), F("", 0)], [0, 1, 1]),
    "a new id without a name goes with its index": ([F("x", 0, "f"), F("y", 0), F("y", 0)], [0, 0, 0]),
    "a new id without a name and without an index opens a call": ([F("x", None, "f"), F("y")], [0, 1]),
    "an id may come later": ([F("", 0, "f"), F("x", 0), F("x")], [0, 0, 0]),
    "an index opens a call": ([F("", 3, "f"), F("", 1, "f"), F("", 3)], [0, 1, 0]),
    "nothing at all goes on with the last call": ([F("x", 0, "f"), F("y", 1, "f"), F()], [0, 1, 1]),
    "nothing at all opens the first call": ([F(), F()], [0, 0]),
    "another name opens a call": ([F("", None, "f"), F("", None, "g"), F("", None, "g")], [0, 1, 1]),
    "another name opens a call on its index": ([F("x", 0, "f"), F("", 0, "g"), F("", 0)], [0, 1, 1]),
    "complete arguments and new ones": ([F("", 0, "f", '{"a":{'), F("", 0, "", "}}"), F("", 0, "f", " {")], [0, 0, 1]),
    "complete arguments and nothing new": ([F("", 0, "f", "{}"), F("", 0, "f", ""), F("", 0, "", "\n")], [0, 0, 0]),
    "braces in strings": ([F("", 0, "f", '{"a":"}\\"'), F("", 0, "", '}{"'), F("", 0, "", "}"), F("", 0, "", "{")],
                          [0, 0, 0, 1]),
    "an id makes arguments only arguments": ([F("x", 0, "f", "{}"), F("", 0, "", "{}")], [0, 0]),
}  # fmt: skip


@pytest.mark.parametrize(("fragments", "expected"), ROUTES.values(), ids=ROUTES)
def test_fragments_find_their_calls(fragments: list[Fragment], expected: list[int]) -> None:
    assert numbers(*fragments) == expected


def test_a_name_and_an_id_that_are_known_stay() -> None:
    router = CallRouter()
    router.route("x", 0, "f", "")
    call = router.route("y", 0, "", "")
    assert (call.call_id, call.name, router.route("x", 0, "other", "").name) == ("x", "f", "f")


def test_the_number_of_calls_is_bounded() -> None:
    router = CallRouter()
    for number in range(MAX_CALLS):
        assert router.route(str(number), number, "f", "").number == number
    with pytest.raises(MalformedData, match="tool calls"):
        router.route("more", None, "f", "")


def test_ids_and_indexes_that_change_with_every_fragment_are_not_all_kept() -> None:
    router = CallRouter()
    router.route("x", 0, "f", "")
    for number in range(5000):
        assert router.route(f"id{number}", 0, "", "1").number == 0
        assert router.route("x", number, "", "1").number == 0
    kept = [router.route(f"id{number}", None, "", "1").number == 0 for number in range(1000)]
    assert all(kept)
    opened = [router.route(f"id{number}", None, "", "1").number for number in range(4000, 4000 + MAX_CALLS - 1)]
    assert opened == list(range(1, MAX_CALLS))  # an id that was not kept opens a call, of which there cannot be many


# ---- whole streams, as servers of several habits write the same calls

tool_names = st.sampled_from(["f", "g", "look_up"])
objects = st.dictionaries(texts, texts | st.integers(-9, 9) | st.dictionaries(texts, texts, max_size=1), max_size=2)
drawn_calls = st.lists(st.tuples(tool_names, objects.map(json.dumps)), min_size=1, max_size=4)

HABITS = ("openai", "no index", "index 0", "no index whole", "index 0 whole", "no id whole", "repeats", "new ids")


@st.composite
def messy_streams(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[ToolCall]]:
    """Draw tool-call fragments, one a chunk, and the calls that they mean."""
    habit = draw(st.sampled_from(HABITS))
    fragments: list[dict[str, Any]] = []
    meant: list[ToolCall] = []
    for number, (name, arguments) in enumerate(draw(drawn_calls)):
        call_id = "" if habit == "no id whole" else f"call_{number}"
        meant.append(ToolCall(call_id, name, arguments))
        place: dict[str, Any] = {} if "no i" in habit else {"index": 0 if habit.startswith("index 0") else number}
        if "whole" in habit:
            called = {"name": name, "arguments": arguments}
            fragments.append({**place, **({"id": call_id} if call_id else {}), "function": called})
            continue
        fragments.append({**place, "id": call_id, "function": {"name": name, "arguments": ""}})
        for count, piece in enumerate(draw(splits(arguments.encode()))):
            again: dict[str, Any] = {"index": place["index"]} if place else {}
            said: dict[str, Any] = {"arguments": piece.decode()}
            if habit == "repeats":
                again["id"], said["name"] = call_id, name
            elif habit == "new ids":
                again["id"] = f"new_{number}_{count}"
            fragments.append({**again, "function": said})
    return fragments, meant


@given(messy_streams())
def test_every_habit_gives_the_same_calls(stream: tuple[list[dict[str, Any]], list[ToolCall]]) -> None:
    fragments, meant = stream
    choices: list[dict[str, Any]] = [{"index": 0, "delta": {"tool_calls": [fragment]}} for fragment in fragments]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    wire = b"".join(b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode() for choice in choices)
    decoder, collector = openai_chat.DIALECT.decoder(), Collector()
    for event in (*decoder.receive_data(wire), *decoder.receive_eof()):
        collector.receive(event)
    (choice,) = collector.result().choices
    assert list(choice.tool_calls) == meant
