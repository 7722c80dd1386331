"""Sample values for JSON Schemas: arguments for the tool calls that the mock backend makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, cast

__all__ = ["MAX_DEPTH", "sample"]

MAX_DEPTH: Final = 16
"""Levels of a schema that are followed: a client's schema may nest as deep as its request's JSON, a call need not."""

_Schema = Mapping[str, object]


def sample(schema: object, depth: int = 0) -> object:
    """Make a value that a schema allows, as far as type, enum, const, properties, items and alternatives say.

    Args:
        schema: a JSON Schema. What is malformed in it, and what is not understood, allows anything.
        depth: how deep in the whole schema it lies; below MAX_DEPTH everything is null.
    """
    rules = _mapping(schema)
    if depth >= MAX_DEPTH:
        return None
    for key in ("const", "default"):
        if key in rules:
            return rules[key]
    enum = _sequence(rules.get("enum"))
    if enum:
        return enum[0]
    for key in ("anyOf", "oneOf", "allOf"):
        alternatives = _sequence(rules.get(key))
        if alternatives:
            return sample(alternatives[0], depth + 1)
    return _BY_TYPE.get(_type_of(rules), _sample_null)(rules, depth)


def _type_of(rules: _Schema) -> str:
    kinds = rules.get("type")
    names = [kinds, *_sequence(kinds)]
    return next((name for name in names if isinstance(name, str)), "object" if "properties" in rules else "")


def _sample_object(rules: _Schema, depth: int) -> object:
    properties = _mapping(rules.get("properties"))
    required = [name for name in _sequence(rules.get("required")) if isinstance(name, str)]
    return {name: sample(properties.get(name), depth + 1) for name in required}


def _sample_array(rules: _Schema, depth: int) -> object:
    return [sample(rules["items"], depth + 1)] if "items" in rules else []


def _sample_number(rules: _Schema, _: int) -> object:
    minimum = rules.get("minimum")
    return minimum if isinstance(minimum, int | float) else 1


def _sample_string(_: _Schema, __: int) -> object:
    return "sample text"


def _sample_boolean(_: _Schema, __: int) -> object:
    return True


def _sample_null(_: _Schema, __: int) -> object:
    return None


_BY_TYPE: Final[dict[str, Callable[[_Schema, int], object]]] = {
    "object": _sample_object,
    "array": _sample_array,
    "integer": _sample_number,
    "number": _sample_number,
    "string": _sample_string,
    "boolean": _sample_boolean,
}


def _mapping(value: object) -> _Schema:
    return cast("_Schema", value) if isinstance(value, dict) else {}


def _sequence(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
