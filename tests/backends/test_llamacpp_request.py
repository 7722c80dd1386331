"""What the engine is asked, and what is read from a model's file."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.backends.fakes import request

from tokenwire.backends._llama_model import MODEL_PACKAGE, find_installed_model, read_chat_template
from tokenwire.backends._llama_request import HONOURED, HONOURED_WITH_TOOLS, request_bodies
from tokenwire.backends._llama_template import CALL_END, CALL_MARK, CHATML_WITH_TOOLS, knows_tools, template_for
from tokenwire.core.request import GenerationRequest, Message, TextPart, Tool, ToolCall

TOOLS = (Tool("f", "does", {"type": "object"}), Tool("g"))


def body(*, marks_calls: bool = True, **fields: Any) -> dict[str, Any]:
    """The body of a request for one choice."""
    (only,) = request_bodies(request("hi", **fields), default_max_tokens=99, marks_calls=marks_calls)
    decoded: dict[str, Any] = json.loads(only)
    return decoded


def test_what_is_always_said() -> None:
    assert body() == {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "max_tokens": 99,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 5),
        ("temperature", 0.0),
        ("top_p", 0.5),
        ("presence_penalty", 1.0),
        ("frequency_penalty", -1.0),
        ("seed", 7),
        ("stop", ("a", "b")),
        ("logit_bias", {"60": -100.0}),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_what_is_passed_on(field: str, value: Any) -> None:
    assert body(**{field: value})[field] == json.loads(json.dumps(value))
    assert field in HONOURED


def test_logprobs() -> None:
    sent = body(logprobs=True, top_logprobs=3)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 3)


def test_everything_that_is_honoured_is_a_field_of_a_request() -> None:
    assert set(GenerationRequest.__struct_fields__) >= HONOURED_WITH_TOOLS


@pytest.mark.parametrize(
    ("seed", "sent"), [(-5, 2**32 - 6), (2**40, 256), (0, 0), (2**32 - 1, 0), (2**32 - 2, 2**32 - 2)]
)
def test_any_seed_is_one_of_the_engines_and_none_asks_for_chance(seed: int, sent: int) -> None:
    assert body(seed=seed)["seed"] == sent


def test_each_choice_has_the_next_seed() -> None:
    bodies = request_bodies(request(n=3, seed=2**32 - 3), default_max_tokens=9, marks_calls=True)
    assert [json.loads(one)["seed"] for one in bodies] == [2**32 - 3, 2**32 - 2, 0]


def test_templates_know_no_developer_and_no_parts() -> None:
    turns = (Message("developer", (TextPart("be "), TextPart("kind"))), Message("user", (TextPart("hi"),)))
    assert body(messages=turns)["messages"][0] == {"role": "system", "content": "be kind"}


def test_turns_with_tools_arrive() -> None:
    turns = (
        Message("user", (TextPart("hi"),)),
        Message("assistant", (), None, (ToolCall("c1", "f", '{"a":1}'),)),
        Message("tool", (TextPart("42"),), None, (), "c1"),
    )
    _, called, answered = body(messages=turns, tools=TOOLS)["messages"]
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert answered == {"role": "tool", "content": "42", "tool_call_id": "c1"}


def test_tools_that_may_be_called() -> None:
    sent = body(tools=TOOLS)
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["f", "g"]
    assert sent["tools"][1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert sent["messages"][-1]["role"] == "user"
    assert sent.get("tool_choice", "auto") == "auto"


def test_tools_that_must_not_be_called_are_not_shown() -> None:
    assert "tools" not in body(tools=TOOLS, tool_choice="none")


@pytest.mark.parametrize(("choice", "names"), [("required", ["f", "g"]), ("function:g", ["g"])])
def test_a_call_that_must_come_is_begun_and_ended_with(choice: str, names: list[str]) -> None:
    sent = body(tools=TOOLS, tool_choice=choice, stop=("x",))
    assert [tool["function"]["name"] for tool in sent["tools"]] == names
    assert sent["tool_choice"] == "required"
    assert sent["messages"][-1] == {"role": "assistant", "content": CALL_MARK}
    assert sent["stop"] == ["x", CALL_END]


def test_a_template_of_the_models_own_has_its_own_marks() -> None:
    sent = body(marks_calls=False, tools=TOOLS, tool_choice="function:g")
    assert sent["tool_choice"] == "required"
    assert sent["messages"][-1]["role"] == "user"
    assert "stop" not in sent


# The template


@pytest.mark.parametrize(
    ("own", "chosen"),
    [
        ("{{ '<|im_start|>' }}", CHATML_WITH_TOOLS),
        ("{{ '<|im_start|>' }}{% if tools %}", None),
        ("[INST] {{ messages }}", None),
        ("", None),
    ],
)
def test_only_chatml_without_tools_is_replaced(own: str, chosen: str | None) -> None:
    assert template_for(own) == chosen


def test_our_template_writes_the_marks_that_calls_are_begun_with() -> None:
    assert knows_tools(CHATML_WITH_TOOLS)
    assert CALL_MARK.strip() in CHATML_WITH_TOOLS
    assert CALL_END in CHATML_WITH_TOOLS


# The file


def gguf(*pairs: tuple[str, bytes]) -> bytes:
    """A GGUF file's beginning with these keys, each with the type of its value before the value."""
    packed = [struct.pack("<Q", len(key)) + key.encode() + value for key, value in pairs]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(packed) + b"\0" * 64


def string(text: str) -> bytes:
    return struct.pack("<IQ", 8, len(text.encode())) + text.encode()


@pytest.mark.parametrize("template", ["{{ messages }} é 🌟", ""])
def test_the_template_is_read_from_the_file(tmp_path: Path, template: str) -> None:
    path = tmp_path / "m.gguf"
    others = ("general.name", string("tokenizer.chat_template")), ("n", struct.pack("<II", 4, 7))
    path.write_bytes(gguf(*others, ("tokenizer.chat_template", string(template))))
    assert read_chat_template(path) == template


def test_a_file_without_template(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(("general.name", string("x"))))
    assert read_chat_template(path) == ""


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_file_that_is_cut_off_has_what_is_left(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.gguf"
    whole = gguf(("tokenizer.chat_template", string("template"))).rstrip(b"\0")
    path.write_bytes(whole[:-cut])
    assert "template".startswith(read_chat_template(path))


@pytest.mark.parametrize("data", [b"", b"GGU", b"hello, world"])
def test_a_file_of_another_kind(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(OSError, match="is no GGUF file"):
        read_chat_template(path)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that can be imported from."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, MODEL_PACKAGE, raising=False)
    return tmp_path


def test_the_installed_model_is_found_without_importing_its_package(on_path: Path) -> None:
    package = on_path / MODEL_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    assert find_installed_model() is None
    (package / "Small.Q4_1.gguf").write_bytes(b"GGUF")
    assert find_installed_model() == package / "Small.Q4_1.gguf"
    assert MODEL_PACKAGE not in sys.modules


def test_without_the_package_there_is_none(on_path: Path) -> None:
    assert list(on_path.iterdir()) == []
    assert find_installed_model() is None
