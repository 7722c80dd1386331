"""The official openai SDK in each of its pinned major versions, sync and async, against the bundled server."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import HERE, Server, curl, notes, run_program, text_of, until

Results = Mapping[str, Any]
Call = Mapping[str, Any]
Ask = Callable[[Mapping[str, Call]], Results]

_ROOT: Final = HERE.parents[1]
_PINS: Final = {
    "openai3": (sys.executable, HERE / "requirements.txt"),
    "openai2": (_ROOT / ".venv-e2e-openai2" / "bin" / "python", HERE / "requirements-openai2.txt"),
    "openai1": (_ROOT / ".venv-e2e-openai1" / "bin" / "python", HERE / "requirements-openai1.txt"),
}
_PROMPT: Final = "Tell me about owls."
_LONG: Final = 1000
"""More tokens than the mock ever says: its text comes to its own end."""

_FAILING: Final = ("fails_at_once", "fails_midway", "async_fails_midway")
_VERBS: Final = ("stream", "whole", "async_stream", "async_whole")
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "exact": {"type": "boolean"}},
                "required": ["word", "exact"],
                "additionalProperties": False,
            },
            "strict": True,  # the stream helper takes no other
        },
    }
]


def _prompt(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture(scope="module", params=sorted(_PINS))
def ask(request: pytest.FixtureRequest) -> Ask:
    """Make calls in one environment; it takes the calls by name, and returns the results by name."""
    python, pins = _PINS[request.param]

    def make_calls(calls: Mapping[str, Call]) -> Results:
        said = run_program([str(python), str(HERE / "clients" / "openai_client.py")], given=json.dumps(calls))
        answer = json.loads(said)
        pinned = re.search(r"^openai==(\S+)$", pins.read_text(), re.MULTILINE)
        assert pinned is not None
        assert answer["version"] == pinned[1], f"{python} is out of date; make e2e brings it up to date"
        results: Results = answer["results"]
        return results

    return make_calls


@pytest.fixture(scope="module")
def told(ask: Ask, mock: Server, shared: Serve, loop: str) -> Results:
    """What one SDK says about the servers of one loop, all in one run of its interpreter: the import takes the longest."""
    text = text_of(curl(f"{mock.url}/chat", "-G", "--data-urlencode", f"prompt={_PROMPT}", "-d", f"max_tokens={_LONG}"))
    stop = text[len(text) // 2 - 5 : len(text) // 2 + 6]  # over the border of tokens, which are words
    asked = {**_prompt(_PROMPT), "max_tokens": _LONG}
    calls: dict[str, dict[str, object]] = {
        "stop": {"with": {**asked, "stop": ["never said", stop]}},
        "plain": {"with": asked},
        "max_tokens": {"with": {"max_tokens": 5}},
        "max_completion_tokens": {"with": {"max_completion_tokens": 5}},
        "n": {"with": {"n": 2, "max_tokens": 20}},
        "tools": {"with": {"tools": _TOOLS, "tool_choice": "required"}},
        "named_tool": {"with": {"tools": _TOOLS, "tool_choice": {"type": "function", "function": {"name": "lookup"}}}},
        "no_model": {"with": {"model": "gpt-none"}},
        "bad_value": {"with": {"temperature": 9}},
        "no_messages": {"with": {"messages": []}},
    }
    made = {f"{verb}/{name}": {"do": verb, **call} for verb in _VERBS for name, call in calls.items()}
    for verb in ("stream", "async_stream"):
        made[f"{verb}/usage"] = {"do": verb, "with": {"max_tokens": 7, "stream_options": {"include_usage": True}}}
    for verb in ("helper", "async_helper"):
        made[f"{verb}/plain"] = {"do": verb, "with": asked}
        made[f"{verb}/tools"] = {"do": verb, **calls["tools"]}
        made[f"{verb}/usage"] = {"do": verb, "with": {**asked, "stream_options": {"include_usage": True}}}
    made["models"] = {"do": "models"}
    made["async_models"] = {"do": "async_models"}
    made["model"] = {"do": "model", "with": {"model": "mock"}}
    made["missing_model"] = {"do": "model", "with": {"model": "gpt-none"}}
    for verb in _VERBS:
        for backend in _FAILING:
            asked = {"model": backend, **_prompt("Hello")}
            made[f"{verb}/{backend}"] = {"do": verb, "with": asked, "url": shared(backend, loop=loop).url}
    results = ask({name: {"url": mock.url, **call} for name, call in made.items()})
    return {**results, "text": text, "stop": stop}


_EVERY_VERB: Final = pytest.mark.parametrize("verb", _VERBS)
_STREAMING_VERBS: Final = pytest.mark.parametrize("verb", ["stream", "async_stream"])
_HELPERS: Final = pytest.mark.parametrize("verb", ["helper", "async_helper"])


@_EVERY_VERB
def test_text_is_what_curl_reads(told: Results, verb: str) -> None:
    result = told[f"{verb}/plain"]
    assert result["texts"] == {"0": told["text"]}
    assert result["finishes"] == {"0": "stop"}
    assert result["roles"] == [[0, "assistant"]]


@_STREAMING_VERBS
def test_all_chunks_have_one_envelope(told: Results, verb: str) -> None:
    ((stream_id, kind, created, model),) = told[f"{verb}/plain"]["envelopes"]
    assert stream_id.startswith("chatcmpl-")
    assert (kind, model) == ("chat.completion.chunk", "mock")
    assert created > 0


@_EVERY_VERB
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_with_length(told: Results, verb: str, field: str) -> None:
    result = told[f"{verb}/{field}"]
    assert result["finishes"] == {"0": "length"}
    assert len(result["texts"]["0"].split()) in range(1, 6)


@pytest.mark.parametrize("verb", ["whole", "async_whole"])
def test_a_whole_answer_counts_its_tokens(told: Results, verb: str) -> None:
    (usage,) = told[f"{verb}/max_tokens"]["usages"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


@_STREAMING_VERBS
def test_include_usage_adds_a_last_chunk_without_choices(told: Results, verb: str) -> None:
    result = told[f"{verb}/usage"]
    *before, last = result["usages"]
    assert before
    assert not any(before)
    assert last["completion_tokens"] == 7
    assert result["choices_in_last"] == 0
    assert result["finishes"] == {"0": "length"}


@_STREAMING_VERBS
def test_without_include_usage_no_chunk_has_any(told: Results, verb: str) -> None:
    result = told[f"{verb}/plain"]
    assert not any(result["usages"])
    assert result["choices_in_last"] == 1


@_EVERY_VERB
def test_two_choices_are_two_answers(told: Results, verb: str) -> None:
    result = told[f"{verb}/n"]
    assert result["texts"].keys() == {"0", "1"}
    assert result["texts"]["0"] != result["texts"]["1"]
    assert result["finishes"] == {"0": "length", "1": "length"}
    assert result["roles"] == [[0, "assistant"], [1, "assistant"]]


@_EVERY_VERB
def test_a_stop_string_ends_the_text_before_it(told: Results, verb: str) -> None:
    result = told[f"{verb}/stop"]
    assert result["texts"] == {"0": told["text"].partition(told["stop"])[0]}
    assert result["finishes"] == {"0": "stop"}


@_EVERY_VERB
@pytest.mark.parametrize("wish", ["tools", "named_tool"])
def test_a_required_tool_is_called(told: Results, verb: str, wish: str) -> None:
    result = told[f"{verb}/{wish}"]
    (call,) = result["calls"].values()
    assert call["name"] == "lookup"
    assert call["id"].startswith("call_")
    arguments = json.loads(call["arguments"])
    assert isinstance(arguments["word"], str)
    assert isinstance(arguments["exact"], bool)
    assert result["finishes"] == {"0": "tool_calls"}


@_HELPERS
def test_the_stream_helper_folds_to_the_same_text(told: Results, verb: str) -> None:
    result = told[f"{verb}/plain"]
    assert result["texts"] == {"0": told["text"]}
    assert result["finishes"] == {"0": "stop"}
    assert {"chunk", "content.delta", "content.done"} <= set(result["kinds"])


@_HELPERS
def test_the_stream_helper_keeps_the_usage(told: Results, verb: str) -> None:
    (usage,) = told[f"{verb}/usage"]["usages"]
    assert usage["completion_tokens"] > 0


@_HELPERS
def test_the_stream_helper_folds_a_tool_call(told: Results, verb: str) -> None:
    result = told[f"{verb}/tools"]
    assert result["calls"] == told["whole/tools"]["calls"]
    assert "tool_calls.function.arguments.done" in result["kinds"]


@pytest.mark.parametrize("name", ["models", "async_models"])
def test_models_are_listed(told: Results, name: str) -> None:
    assert [(model["id"], model["object"]) for model in told[name]] == [("mock", "model")]


def test_a_model_is_retrieved(told: Results) -> None:
    assert told["model"]["id"] == "mock"
    assert told["missing_model"]["raised"]["class"] == "NotFoundError"


@_EVERY_VERB
def test_an_unknown_model_is_not_found(told: Results, verb: str) -> None:
    raised = told[f"{verb}/no_model"]["raised"]
    assert (raised["class"], raised["status"]) == ("NotFoundError", 404)
    assert (raised["code"], raised["param"]) == ("model_not_found", "model")


@_EVERY_VERB
@pytest.mark.parametrize(("name", "param"), [("bad_value", "temperature"), ("no_messages", "messages")])
def test_a_bad_request_names_its_field(told: Results, verb: str, name: str, param: str) -> None:
    raised = told[f"{verb}/{name}"]["raised"]
    assert (raised["class"], raised["status"]) == ("BadRequestError", 400)
    assert raised["param"] == param
    assert raised["type"] == "invalid_request_error"


# ------------------------------------------------------------------------------------ backends of the tests' own

_WATCHED: Final = {
    "flaky": ("stream", "flaky", ()),
    "gated": ("open_gate", "gated", ()),
    "async_gated": ("open_gate", "async_gated", ()),
    "full": ("refused_beside", "gated", ("--max-streams", "1", "--max-queue", "0")),
    "endless": ("leave", "endless", ()),
    "async_endless": ("leave", "async_endless", ()),
}
"""By name: what the SDK does, the backend, and the arguments of its server."""


@pytest.fixture(scope="module")
def watched(ask: Ask, shared: Serve, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one SDK says about backends that are watched, by the names of _WATCHED, with their rooms in `room`."""
    rooms = {name: tmp_path_factory.mktemp(name) for name in _WATCHED}
    results = ask(
        {
            name: {
                "do": verb,
                "url": shared(backend, *arguments).url,
                "retries": 2 if name == "flaky" else 0,
                "with": {"model": backend, **_prompt(str(rooms[name]))},
            }
            for name, (verb, backend, arguments) in _WATCHED.items()
        }
    )
    return {name: {**result, "room": rooms[name]} for name, result in results.items()}


@_EVERY_VERB
def test_a_backend_that_raises_at_once_is_an_internal_server_error(
    told: Results, shared: Serve, loop: str, verb: str
) -> None:
    raised = told[f"{verb}/fails_at_once"]["raised"]
    assert (raised["class"], raised["status"]) == ("InternalServerError", 500)
    assert "SecretError" in raised["message"]
    assert "hunter2" not in raised["message"]
    assert "hunter2" in shared("fails_at_once", loop=loop).log


@pytest.mark.parametrize("backend", ["fails_midway", "async_fails_midway"])
@_STREAMING_VERBS
def test_a_backend_that_raises_midway_raises_in_the_sdk(told: Results, backend: str, verb: str) -> None:
    result = told[f"{verb}/{backend}"]
    raised, heard = result["raised"], result["heard"]
    assert (raised["class"], raised["status"]) == ("APIError", None)
    assert "SecretError" in raised["message"]
    assert "hunter2" not in raised["message"]
    assert raised["type"] == "server_error"
    assert heard["texts"] == {"0": "one two "}
    assert heard["finishes"] == {}


@pytest.mark.parametrize("backend", ["fails_midway", "async_fails_midway"])
@pytest.mark.parametrize("verb", ["whole", "async_whole"])
def test_half_an_answer_is_no_whole_answer(told: Results, backend: str, verb: str) -> None:
    assert told[f"{verb}/{backend}"]["raised"]["class"] == "InternalServerError"


def test_the_sdk_tries_again_after_an_error_before_the_first_token(watched: Results) -> None:
    result = watched["flaky"]
    assert result["texts"] == {"0": "at last"}
    assert notes(result["room"]) == ["run", "run"]


@pytest.mark.parametrize("name", ["gated", "async_gated"])
def test_tokens_arrive_before_the_stream_ends(watched: Results, name: str) -> None:
    result = watched[name]
    assert result["texts"] == {"0": "before-0 before-1 before-2 behind-0 behind-1 "}
    assert result["finishes"] == {"0": "stop"}


def test_a_full_server_is_a_rate_limit(watched: Results) -> None:
    result = watched["full"]
    refusal = result["refusal"]
    assert (refusal["class"], refusal["status"], refusal["code"]) == ("RateLimitError", 429, "queue_full")
    assert refusal["type"] == "rate_limit_error"
    assert int(refusal["retry_after"]) >= 1
    assert result["finishes"] == {"0": "stop"}
    assert notes(result["room"]) == ["run", "closed"]


@pytest.mark.parametrize("name", ["endless", "async_endless"])
def test_leaving_a_stream_closes_the_generator(watched: Results, name: str) -> None:
    room = watched[name]["room"]
    until(lambda: "closed" in notes(room), "the generator's finally block")
    assert notes(room) == ["run", "closed"]
