"""A session of a graph with a program's names, by the names that the model's own arguments and outputs have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modelopt_tdq.export.names import NAMES

__all__ = ["by_forward_names"]


class _ForwardNames:
    """Everything but names is the session's own."""

    def __init__(self, session: Any, names: Mapping[str, str]) -> None:
        self._session, self._names = session, names
        self._own = {new: own for own, new in names.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def _by_own(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self._own.get(name, name): value for name, value in values.items()}

    @property
    def inputs(self) -> dict[str, Any]:
        return self._by_own(self._session.inputs)

    @property
    def shapes(self) -> dict[str, Any]:
        return self._by_own(getattr(self._session, "shapes", {}))

    @property
    def outputs(self) -> list[str]:
        return [self._own.get(name, name) for name in self._session.outputs]

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = {self._names.get(name, name): value for name, value in inputs.items()}
        return self._by_own(self._session(given))


def by_forward_names(session: Any) -> Any:
    """``session`` with inputs and outputs called as by the model's forward, whatever the graph calls them."""
    names = json.loads(getattr(session, "metadata", {}).get(NAMES, "{}"))
    return _ForwardNames(session, names) if names else session
