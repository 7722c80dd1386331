"""Hypothesis profiles: `ci` draws the same examples every time, `dev` looks for new ones."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline in either: a slow machine is no bug, and no test asserts on the wall clock.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
