"""How a callable is told what was asked for: by the names of its parameters.

| parameter | gets |
|---|---|
| `request`, or annotated `GenerationRequest` | the GenerationRequest |
| `prompt` | the text of the last user message |
| a field of GenerationRequest: `messages`, `max_tokens`, `temperature`, ... | that field |
| one of any other name, with no annotation or `str`, without a default | the prompt, if nothing above told it |
| any other with a default, `*args`, `**kwargs` | nothing |
| any other | a TypeError when the backend is made |

A field that the client left out (None) is not passed where the parameter has a default of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Final, NamedTuple

from tokenwire.core.request import GenerationRequest

__all__ = ["Arguments", "name_of"]

_Getter = Callable[[GenerationRequest], object]
_Parameters = list[inspect.Parameter]

_FIELDS: Final = frozenset(GenerationRequest.__struct_fields__)
_PROMPT: Final[_Getter] = attrgetter("prompt")
_TELLING: Final = frozenset({"request", "prompt", "messages"})
_VARIADIC: Final = frozenset({inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


def _whole(request: GenerationRequest) -> object:
    return request


class _Slot(NamedTuple):
    """One parameter that is passed."""

    name: str
    get: _Getter
    is_positional: bool
    has_default: bool


class Arguments:
    """The arguments that a callable wants, read from its signature once.

    Args:
        function: the callable.

    Raises:
        TypeError: its signature cannot be read, or wants something that no request has.
    """

    __slots__ = ("_slots", "fields")

    fields: frozenset[str]
    """The fields of GenerationRequest that are passed by name."""

    def __init__(self, function: Callable[..., object]) -> None:
        parameters = _parameters_of(function)
        getters = _getters_of(function, parameters)
        self._slots = [
            _slot(parameter, getters[parameter.name]) for parameter in parameters if parameter.name in getters
        ]
        self.fields = _FIELDS & getters.keys()

    def bind(self, request: GenerationRequest) -> tuple[list[object], dict[str, object]]:
        """Make the positional and the keyword arguments of one call."""
        positional: list[object] = []
        keywords: dict[str, object] = {}
        for slot in self._slots:
            value = slot.get(request)
            if slot.is_positional:
                positional.append(value)
            elif value is not None or not slot.has_default:
                keywords[slot.name] = value
        return positional, keywords


def name_of(function: object) -> str:
    """Name a callable for people: its own name, or its class's where it has none."""
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def _parameters_of(function: Callable[..., object]) -> _Parameters:
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        message = f"{name_of(function)}: its parameters cannot be read; wrap it in a function with a `prompt` parameter"
        raise TypeError(message) from error
    return [parameter for parameter in signature.parameters.values() if parameter.kind not in _VARIADIC]


def _getters_of(function: Callable[..., object], parameters: _Parameters) -> dict[str, _Getter]:
    getters = {parameter.name: get for parameter in parameters if (get := _getter(parameter)) is not None}
    unknown = [p for p in parameters if p.name not in getters and p.default is p.empty]
    if (
        len(unknown) == 1
        and _may_be_text(unknown[0])
        and _whole not in getters.values()
        and not _TELLING & getters.keys()
    ):
        getters[unknown[0].name] = _PROMPT
    elif unknown:
        names = ", ".join(parameter.name for parameter in unknown)
        message = (
            f"{name_of(function)} wants {names}; a request can give: request, prompt, {', '.join(sorted(_FIELDS))}"
        )
        raise TypeError(message)
    return getters


def _getter(parameter: inspect.Parameter) -> _Getter | None:
    name = parameter.name
    if name == "request" or _is_request(parameter.annotation):
        return _whole
    if name == "prompt":
        return _PROMPT
    if name in _FIELDS:
        return attrgetter(name)
    if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is not parameter.empty:
        default: object = parameter.default  # passed on, so that the next one keeps its place
        return lambda _: default
    return None


def _is_request(annotation: object) -> bool:
    """Whether an annotation, perhaps still a string, names GenerationRequest."""
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] == GenerationRequest.__name__
    return annotation is GenerationRequest


def _may_be_text(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (parameter.empty, str, "str")


def _slot(parameter: inspect.Parameter, get: _Getter) -> _Slot:
    has_default = parameter.default is not parameter.empty
    return _Slot(parameter.name, get, parameter.kind is parameter.POSITIONAL_ONLY, has_default)
