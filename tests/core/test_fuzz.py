"""A short run of the fuzzer over every decoder, and all inputs that were kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz import ACCEPTED, CORPUS, TARGETS, check, inputs, kept

each_target = pytest.mark.parametrize("name", TARGETS)


@each_target
def test_kept_inputs(name: str) -> None:
    corpus = kept(name)
    assert corpus, "every target has some inputs to begin with"
    for data in corpus:
        check(TARGETS[name], data, [len(data) // 3, len(data) // 2])


@each_target
@settings(max_examples=60)
@given(st.data(), st.lists(st.integers(0, 1 << 16), max_size=6))
def test_drawn_inputs(name: str, data: st.DataObject, cuts: list[int]) -> None:
    check(TARGETS[name], data.draw(inputs(TARGETS[name])), cuts)


def test_every_file_of_the_corpus_has_its_target() -> None:
    assert {path.stem for path in CORPUS.iterdir()} == set(TARGETS)


def test_every_accepted_exception_has_a_reason() -> None:
    assert all(len(reason) > 20 for reason in ACCEPTED.values())
