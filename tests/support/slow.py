"""Values of a parametrization of which most are left to the tests before a release."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """All ``values``, tuples for several names; those that are not ``quick`` have the marker ``slow``."""
    made = list(values)
    unknown = [value for value in quick if value not in made]
    assert not unknown, unknown
    return [value if value in quick else _slow(value) for value in made]


def _slow(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
