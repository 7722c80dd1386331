"""llama.cpp in this process, by way of xllamacpp: how it is started, and the one method of it that is used."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from msgspec import Struct

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["BATCH_TOKENS", "CONTEXT_TOKENS", "SLOTS", "Engine", "EngineOptions", "open_engine"]

BATCH_TOKENS: Final = 32
"""Prompt tokens of one engine step. Whoever streams waits for it, and so does a cancel: with llama.cpp's own 2048 one
step of a long prompt holds up every other stream for many seconds, and is no faster on a CPU."""

SLOTS: Final = 4
"""Answers that are generated at a time: a step of four costs hardly more than a step of one."""

CONTEXT_TOKENS: Final = 8192
"""The most tokens of a prompt with its answer. Memory is taken for all slots at the start: 24 KB a token for SmolLM2."""

_QUIET: Final = -1


class Engine(Protocol):
    """What is needed of `xllamacpp.Server`."""

    def handle_chat_completions(self, request: bytes, callback: Callable[[bytes], bool]) -> None:
        """Answer a request in OpenAI's words, and return when that has ended.

        Args:
            request: the JSON text; bytes make it call back with bytes.
            callback: called in this very thread, without the interpreter's lock held in between, with the JSON text of
                each chunk or of an error; when it returns True, the answer is given up.

        Raises:
            ValueError: the request cannot be served as it is.
            RuntimeError: anything else that kept it from beginning.
        """
        ...


class EngineOptions(Struct, frozen=True, kw_only=True):
    """What an operator may set about the engine."""

    slots: int = SLOTS
    """Answers at a time."""
    context_tokens: int = CONTEXT_TOKENS
    """The most tokens of a prompt with its answer; 0 for as many as the model was trained with."""
    threads: int = 0
    """CPU threads; 0 for the engine's own choice, which is the number of physical cores."""
    template: str | None = None
    """What stands in for the model's own chat template."""


def open_engine(path: Path, options: EngineOptions, *, listen: str | None = None) -> Engine:
    """Load a model. Returns when it can answer, which takes seconds to minutes.

    Args:
        path: a GGUF file.
        options: what the operator set.
        listen: an address for the HTTP server that the engine has of its own, for those who measure it; None for none.

    Raises:
        ImportError: xllamacpp is not installed.
        OSError: the file is not there, or is no model that the engine can load.
    """
    xllamacpp = importlib.import_module("xllamacpp")
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    # The engine opens an HTTP server of its own, which no policy of ours guards. So it gets a socket in a folder that is
    # nobody else's, and that is gone before anybody could connect.
    with tempfile.TemporaryDirectory(prefix="tokenwire-") as folder:
        params = _params(xllamacpp, path, options)
        params.hostnames = [listen or str(Path(folder, "engine.sock"))]
        try:
            return cast("Engine", xllamacpp.Server(params))
        except (RuntimeError, ValueError) as error:
            raise OSError(f"llama.cpp cannot load {path}: {error}") from error


def _params(xllamacpp: ModuleType, path: Path, options: EngineOptions) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = options.slots
    params.n_ctx = options.context_tokens * options.slots  # the engine shares it out among the slots
    params.n_batch = params.n_ubatch = max(BATCH_TOKENS, options.slots)
    params.verbosity = _QUIET
    # A cache of prompts outside the slots would take up to 8 GiB, and copies a slot's memory while all streams wait.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.ui = params.endpoint_slots = False
    if options.template is not None:
        params.chat_template = options.template
    if options.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    return params
