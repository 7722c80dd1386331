"""Fixtures of the core's tests."""

from __future__ import annotations

import pytest
from tests.carriers import CARRIERS, Carriage


@pytest.fixture(params=sorted(CARRIERS))
def carrier(request: pytest.FixtureRequest) -> Carriage:
    """Each carrier in turn: what a policy test asks through."""
    name: str = request.param
    return Carriage(name)
