"""Asks with the official openai SDK, in whatever environment it is run, and prints what the SDK made of the answers.

    python openai_client.py < calls.json > results.json

The calls are `{"name": {"do": VERB, "url": ..., "with": {arguments of the SDK's method}}}`; the results are by the same
names. What the SDK raises is a result too: `{"raised": ...}`, with what had been heard before it in `heard`. Any other
exception is `{"crashed": traceback}`.
"""
# pyright: basic, reportMissingImports=false
# Each pinned SDK is in an environment of its own, and none is where the type checkers look.

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai  # type: ignore[import-not-found, unused-ignore]  # see above

_MESSAGES = [{"role": "user", "content": "Hello"}]
_SETTINGS = {"api_key": "none-needed"}
_TIMEOUT_S = 30.0


class Heard:
    """Folds chunks as any user of the SDK would, and counts what must be the same in all of them."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.finishes: dict[str, str] = {}
        self.roles: list[tuple[int, str]] = []
        self.calls: dict[str, dict[str, str]] = {}
        self.usages: list[Any] = []
        self.envelopes: set[tuple[Any, ...]] = set()
        self.choices_in_last = -1
        self.logprobs: dict[str, list[Any]] = {}

    def take(self, chunk: Any) -> None:
        self.envelopes.add((chunk.id, chunk.object, chunk.created, chunk.model))
        self.usages.append(chunk.usage and chunk.usage.model_dump(exclude_none=True))
        self.choices_in_last = len(chunk.choices)
        for choice in chunk.choices:
            self._take_choice(choice)

    def _take_choice(self, choice: Any) -> None:
        index, delta = str(choice.index), choice.delta
        if delta.role:
            self.roles.append((choice.index, delta.role))
        if delta.content is not None:
            self.texts[index] = self.texts.get(index, "") + delta.content
        if choice.logprobs is not None:
            self.logprobs.setdefault(index, []).extend(_tokens(choice.logprobs))
        if choice.finish_reason:
            assert index not in self.finishes, "a choice has finished twice"
            self.finishes[index] = choice.finish_reason
        for call in delta.tool_calls or ():
            whole = self.calls.setdefault(str(call.index), {"id": "", "name": "", "arguments": ""})
            whole["id"] += call.id or ""
            whole["name"] += call.function.name or ""
            whole["arguments"] += call.function.arguments or ""

    def told(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "finishes": self.finishes,
            "roles": self.roles,
            "calls": self.calls,
            "usages": self.usages,
            "envelopes": sorted(self.envelopes),
            "choices_in_last": self.choices_in_last,
            "logprobs": self.logprobs,
        }


def _tokens(logprobs: Any) -> list[Any]:
    return [token.model_dump() for token in logprobs.content or ()]


def _whole(completion: Any) -> dict[str, Any]:
    """A whole answer, in the same terms."""
    choices = {str(choice.index): choice for choice in completion.choices}
    return {
        "texts": {index: choice.message.content for index, choice in choices.items()},
        "finishes": {index: choice.finish_reason for index, choice in choices.items()},
        "roles": [(choice.index, choice.message.role) for choice in completion.choices],
        "calls": {
            str(at): {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
            for at, call in enumerate(completion.choices[0].message.tool_calls or ())
        },
        "usages": [completion.usage and completion.usage.model_dump(exclude_none=True)],
        "envelopes": [(completion.id, completion.object, completion.created, completion.model)],
        "logprobs": {index: _tokens(choice.logprobs) for index, choice in choices.items() if choice.logprobs},
    }


def _raised(error: openai.APIError) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return {
        "class": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "retry_after": response.headers.get("retry-after") if response is not None else None,
    }


# The verbs. Each takes a client, the arguments of the SDK's method, and what has been heard, to be filled in.


def stream(client: openai.OpenAI, arguments: dict[str, Any], heard: Heard) -> Any:
    for chunk in client.chat.completions.create(stream=True, **arguments):
        heard.take(chunk)
    return heard.told()


def whole(client: openai.OpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    return _whole(client.chat.completions.create(stream=False, **arguments))


def helper(client: openai.OpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    with client.chat.completions.stream(**arguments) as events:
        kinds = [event.type for event in events]
        return _whole(events.get_final_completion()) | {"kinds": sorted(set(kinds))}


def models(client: openai.OpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    return [model.model_dump(include={"id", "object", "owned_by"}) for model in client.models.list(**arguments)]


def model(client: openai.OpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    return client.models.retrieve(**arguments).model_dump(include={"id", "object", "owned_by"})


def open_gate(client: openai.OpenAI, arguments: dict[str, Any], heard: Heard) -> Any:
    """Open the gate that the backend waits at once its tokens are here: whoever holds tokens back hangs."""
    gate = Path(arguments["messages"][0]["content"]) / "go"
    for chunk in client.chat.completions.create(stream=True, **arguments):
        heard.take(chunk)
        if "before-2" in heard.texts.get("0", ""):
            gate.touch()
    return heard.told()


def refused_beside(client: openai.OpenAI, arguments: dict[str, Any], heard: Heard) -> Any:
    """Ask a second time while a stream runs; then let the first one end."""
    gate = Path(arguments["messages"][0]["content"]) / "go"
    first = iter(client.chat.completions.create(stream=True, **arguments))
    heard.take(next(first))
    try:
        client.chat.completions.create(stream=True, **arguments)
        refusal = None
    except openai.APIError as error:
        refusal = _raised(error)
    gate.touch()
    for chunk in first:
        heard.take(chunk)
    return heard.told() | {"refusal": refusal}


def leave(client: openai.OpenAI, arguments: dict[str, Any], heard: Heard) -> Any:
    """Leave in the middle, as `break` does, and close."""
    with client.chat.completions.create(stream=True, **arguments) as chunks:
        for chunk in chunks:
            heard.take(chunk)
            if heard.texts.get("0"):
                break
    return heard.told()


async def async_stream(client: openai.AsyncOpenAI, arguments: dict[str, Any], heard: Heard) -> Any:
    async for chunk in await client.chat.completions.create(stream=True, **arguments):
        heard.take(chunk)
    return heard.told()


async def async_whole(client: openai.AsyncOpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    return _whole(await client.chat.completions.create(stream=False, **arguments))


async def async_helper(client: openai.AsyncOpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    async with client.chat.completions.stream(**arguments) as events:
        kinds = [event.type async for event in events]
        return _whole(await events.get_final_completion()) | {"kinds": sorted(set(kinds))}


async def async_models(client: openai.AsyncOpenAI, arguments: dict[str, Any], _heard: Heard) -> Any:
    return [model.model_dump(include={"id", "object", "owned_by"}) async for model in client.models.list(**arguments)]


_SYNC = (stream, whole, helper, models, model, open_gate, refused_beside, leave)
_ASYNC = (async_stream, async_whole, async_helper, async_models)
_VERBS: dict[str, Any] = {verb.__name__: verb for verb in (*_SYNC, *_ASYNC)}


class _Asker:
    """Makes calls, with one client a server as a program would: their connections are used again and again."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._clients: dict[tuple[Any, ...], Any] = {}

    def ask(self, call: dict[str, Any]) -> Any:
        verb, arguments, heard = _VERBS[call["do"]], call.get("with", {}), Heard()
        if "models" not in call["do"] and call["do"] != "model":
            arguments = {"model": "mock", "messages": _MESSAGES, **arguments}
        kind = openai.AsyncOpenAI if verb in _ASYNC else openai.OpenAI
        client = self._client(kind, call["url"], call.get("retries", 0), call.get("timeout", _TIMEOUT_S))
        try:
            answer = verb(client, arguments, heard)
            return self._runner.run(answer) if verb in _ASYNC else answer
        except openai.APIError as error:
            return {"raised": _raised(error), "heard": heard.told()}
        except Exception:  # noqa: BLE001  # one crash must not hide what the other calls found
            return {"crashed": traceback.format_exc(), "heard": heard.told()}

    def close(self) -> None:
        for (kind, *_), client in self._clients.items():
            if kind is openai.AsyncOpenAI:
                self._runner.run(client.close())
            else:
                client.close()

    def _client(self, kind: Any, url: str, retries: int, timeout: float) -> Any:
        key = (kind, url, retries, timeout)
        if key not in self._clients:
            self._clients[key] = kind(**_SETTINGS, base_url=f"{url}/v1", max_retries=retries, timeout=timeout)
        return self._clients[key]


def _main(calls: Iterable[tuple[str, dict[str, Any]]]) -> None:
    with asyncio.Runner() as runner:
        asker = _Asker(runner)
        results = {name: asker.ask(call) for name, call in calls}
        asker.close()
    json.dump({"version": openai.__version__, "results": results}, sys.stdout)


if __name__ == "__main__":
    _main(json.load(sys.stdin).items())
