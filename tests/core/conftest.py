"""Fixtures of the core's tests."""

from __future__ import annotations

import pytest
from tests.carriers import CARRIERS, Carriage
from tests.conversing import WIRES, Wire


@pytest.fixture(params=sorted(CARRIERS))
def carrier(request: pytest.FixtureRequest) -> Carriage:
    """Each carrier in turn: what a policy test asks through."""
    name: str = request.param
    return Carriage(name)


@pytest.fixture(params=sorted(WIRES))
def wire(request: pytest.FixtureRequest) -> Wire:
    """Each carrier of WebSockets in turn: what a test of conversations talks through."""
    name: str = request.param
    return WIRES[name]
