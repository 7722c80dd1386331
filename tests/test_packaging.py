"""What users install: wheel and sdist are built from the tree, unpacked elsewhere and imported from there."""

from __future__ import annotations

import configparser
import importlib
import json
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("core", "backends", "adapters")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"{PROJECT['name']}-{PROJECT['version']}"

# A program that only wants the events pays for msgspec, and for no loop and no protocol library.
HEAVY = ("anyio", "asyncio", "h11", "socket", "ssl", "trio", "wsproto")


def build(project: Path, target: str, into: Path) -> Path:
    """Build one artefact with the backend of this environment: no isolated environment, so no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, text=True)
    (built,) = into.iterdir()
    return built


def run_outside(code: str, package_dir: Path) -> Any:
    """Run code that prints JSON in an interpreter that sees `package_dir` and the installed dependencies only.

    `-S` keeps out the .pth file of the editable install, which would add the checkout's roots to the namespace.
    """
    paths = [str(package_dir), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = f"import sys; sys.path += {paths!r}\nimport json\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", code],
        cwd=package_dir,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def source_files() -> set[str]:
    """Every file of the three roots that a wheel has to hold, by its path inside it."""
    return {
        path.relative_to(ROOT / root).as_posix()
        for root in SOURCE_ROOTS
        for path in (ROOT / root).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist unpacked file by file: extractall has `filter` since 3.11.4 only, and warns without it since 3.12."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        for member in archive:
            if (content := archive.extractfile(member)) is not None:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    return folder / NAME


def test_no_root_holds_a_module_of_its_own() -> None:
    assert [path for root in SOURCE_ROOTS for path in (ROOT / root / "tokenwire").iterdir() if path.is_file()] == []


def test_the_checkout_is_a_namespace_package() -> None:
    namespace = importlib.import_module("tokenwire")
    assert namespace.__file__ is None
    assert {Path(path) for path in namespace.__path__} == {ROOT / root / "tokenwire" for root in SOURCE_ROOTS}


def test_the_wheel_holds_the_three_roots_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    assert names == source_files()


def test_each_package_ships_its_type_marker(installed: Path) -> None:
    markers = {path.parent.name for path in installed.rglob("py.typed")}
    assert markers == set(SOURCE_ROOTS)


def test_the_wheel_carries_licence_and_entry_point(installed: Path) -> None:
    info = installed / f"{NAME}.dist-info"
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    entry_points = configparser.ConfigParser()
    entry_points.read(info / "entry_points.txt", encoding="utf-8")
    assert dict(entry_points["console_scripts"]) == PROJECT["scripts"]


def test_the_wheel_imports_outside_the_checkout(installed: Path) -> None:
    code = "import tokenwire, tokenwire.core; print(json.dumps([tokenwire.__file__, tokenwire.core.__file__]))"
    namespace_file, core_file = run_outside(code, installed)
    assert namespace_file is None
    assert Path(core_file) == installed / "tokenwire" / "core" / "__init__.py"


def test_importing_the_core_loads_no_loop_and_no_protocol_library(installed: Path) -> None:
    code = f"import tokenwire.core; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert run_outside(code, installed) == []


def test_a_wheel_from_the_sdist_is_the_wheel_from_the_tree(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    again = build(sdist, "wheel", tmp_path)
    with zipfile.ZipFile(wheel) as direct, zipfile.ZipFile(again) as rebuilt:
        assert {entry.filename: entry.CRC for entry in rebuilt.infolist()} == {
            entry.filename: entry.CRC for entry in direct.infolist()
        }


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "tests/test_packaging.py"])
def test_the_sdist_holds_what_a_packager_needs(sdist: Path, name: str) -> None:
    assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
