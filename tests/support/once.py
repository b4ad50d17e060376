"""Models that several tests of a file begin with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


class Once:
    """Makes a model for each key once, and gives copies of it: tests may change theirs."""

    def __init__(self) -> None:
        self._made: dict[str, nn.Module] = {}

    def __call__(self, key: Any, make: Callable[[], nn.Module]) -> nn.Module:
        """A copy of what was made for ``key``, of which the ``repr`` counts."""
        if repr(key) not in self._made:
            self._made[repr(key)] = make()
        return copy.deepcopy(self._made[repr(key)])
