"""`tokenwire bench codec`: the workloads mean what they should, every contender is checked, and the report is whole."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tokenwire.adapters import bench_codec, cli
from tokenwire.adapters._codec_cases import CASES, FLOOR, OWN, Case, CheckError, Contender, Work, check
from tokenwire.adapters._codec_chart import draw_svg
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.events import TextDelta
from tokenwire.core.testing.workloads import STOPS, WORKLOADS, Token, chat_events, plain_events

INSTALLED = [
    pytest.param(case, name, id=f"{case.title}: {name}")
    for case in CASES
    for name, contender in case.contenders.items()
    if contender.is_installed
]
by_workload = pytest.mark.parametrize("tokens", WORKLOADS.values(), ids=WORKLOADS)


@by_workload
def test_tokens_are_escaped_as_json_and_hold_no_stop_string(tokens: tuple[Token, ...]) -> None:
    assert [json.loads(token.escaped) for token in tokens] == [token.text for token in tokens]
    assert not any(stop in "".join(token.text for token in tokens) for stop in STOPS)


@by_workload
def test_events_of_a_workload_are_what_the_dialects_read(tokens: tuple[Token, ...]) -> None:
    for dialect, events in ((openai_chat.DIALECT, chat_events(tokens)), (plain.DIALECT, plain_events(tokens))):
        decoder = dialect.decoder()
        said = [event for data in events for event in decoder.receive_data(data) if isinstance(event, TextDelta)]
        assert [event.text for event in said] == [token.text for token in tokens]
    assert all(b"\nid: bench." in event for event in plain_events(tokens))


@pytest.mark.parametrize(("case", "name"), INSTALLED)
def test_every_contender_does_the_work(case: Case, name: str) -> None:
    check(case, name)
    assert len(case.contenders[name].start()()) == len(WORKLOADS["prose"])


def test_every_case_has_its_floor_first() -> None:
    assert all(next(iter(case.contenders)) == FLOOR for case in CASES)
    assert all(list(case.contenders)[1] == OWN for case in CASES)


@pytest.mark.parametrize("work", [lambda: ["a"], lambda: ["wrong"] * 1000], ids=["too few", "wrong"])
def test_wrong_results_are_not_timed(work: Any) -> None:
    case = Case("c", "f", {"peer": Contender(lambda: work)}, str)
    with pytest.raises(CheckError, match="peer gave"):
        check(case, "peer")


def _nothing() -> Work:
    return list


def test_what_is_not_installed_is_known_by_its_module() -> None:
    assert not Contender(_nothing, "no_such_module").is_installed
    assert not Contender(_nothing, "no_such_package.module").is_installed


def test_command_writes_table_json_svg_and_html(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_codec, "CASES", (CASES[0], CASES[-1]))
    files = {form: tmp_path / f"report.{form}" for form in ("json", "svg", "html")}
    arguments = [part for form, path in files.items() for part in (f"--{form}", str(path))]
    assert cli.main(["bench", "codec", "--rounds", "1", *arguments]) == 0
    printed = capsys.readouterr()
    assert CASES[0].title in printed.out
    assert CASES[-1].title in printed.err
    report = json.loads(files["json"].read_text())
    assert [case["title"] for case in report["cases"]] == [CASES[0].title, CASES[-1].title]
    for case in report["cases"]:
        names = [measured["contender"] for measured in case["measured"]]
        assert names[0] == FLOOR
        assert OWN in names
        assert all(measured["ns_per_token"] > 0 for measured in case["measured"])
    svg = files["svg"].read_text(encoding="utf-8")
    assert svg in files["html"].read_text(encoding="utf-8")


def test_chart_is_self_contained_xml_and_escapes_its_labels() -> None:
    svg = draw_svg("a < b", "x & y", [("g", "f", [("floor", 50.0, False), ('<"&', 1234.0, True)])])
    root = ET.fromstring(svg)  # noqa: S314  # our own text
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert '<"&' in texts
    assert "1.23 µs · 24.7x" in texts
    assert not {"href", "src"} & {name for element in root.iter() for name in element.attrib}
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


def test_missing_rich_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def find_nothing(name: str) -> None:
        assert name == "rich"

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    assert cli.main(["bench", "codec"]) == 1
    assert "pip install 'tokenwire[cli]'" in capsys.readouterr().err
