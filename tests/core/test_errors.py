"""The tree of errors: one root that is never raised, and leaves that say whose fault it was."""

from __future__ import annotations

import pytest

from tokenwire.core import errors
from tokenwire.core.errors import (
    GrammarError,
    LimitExceeded,
    LocalProtocolError,
    MalformedData,
    RemoteProtocolError,
    RequestRefused,
    TokenwireError,
)
from tokenwire.core.events import ErrorKind, StreamError


def test_the_root_cannot_be_raised() -> None:
    with pytest.raises(TypeError, match="leaves"):
        raise TokenwireError("x")


def test_every_error_is_in_the_tree() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), TokenwireError)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (LocalProtocolError("x"), LocalProtocolError),
        (GrammarError("TextDelta", "new"), LocalProtocolError),
        (RemoteProtocolError("x"), RemoteProtocolError),
        (LimitExceeded("max_x", 5), RemoteProtocolError),
        (MalformedData("x"), RemoteProtocolError),
    ],
)
def test_whose_fault_it_was(error: TokenwireError, fault: type[TokenwireError]) -> None:
    sides = {LocalProtocolError, RemoteProtocolError, RequestRefused}
    assert {side for side in sides if isinstance(error, side)} == {fault}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RemoteProtocolError("x"), 400),
        (RemoteProtocolError("x", status=505), 505),
        (MalformedData("x"), 400),
        (LimitExceeded("max_x", 5), 413),
        (LimitExceeded("max_x", 5, status=431), 431),
    ],
)
def test_statuses(error: RemoteProtocolError, status: int) -> None:
    assert error.status == status


def test_what_errors_say() -> None:
    assert str(LimitExceeded("max_x", 5)) == "more than max_x=5"
    assert str(GrammarError("TextDelta", "new")) == "TextDelta is not allowed in state new"
    of_choice = GrammarError("TextDelta", "ended choice", "choice 1")
    assert str(of_choice) == "TextDelta is not allowed in state ended choice of choice 1"
    assert (of_choice.event, of_choice.state, of_choice.key) == ("TextDelta", "ended choice", "choice 1")


def test_a_refusal_carries_its_error() -> None:
    error = StreamError(ErrorKind.NOT_FOUND, "There is none.", "model_not_found")
    refused = RequestRefused(error, headers=(("allow", "GET"),))
    assert (refused.error, refused.headers, str(refused)) == (error, (("allow", "GET"),), "There is none.")
