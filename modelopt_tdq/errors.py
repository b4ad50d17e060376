"""The one kind of error that a user can cause, the one that a missing extra causes, and the one kind of warning."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from modelopt_tdq.install import install_command

__all__ = ["MissingExtraError", "TdqError", "TdqWarning", "require"]


class TdqError(Exception):
    """Something the user passed cannot be used; says which field, which value, and the cure.

    Deliberately no ``ValueError``: pydantic turns those into its own error when raised inside a
    validator, and the message below would be lost.

    Args:
        field: What the user set, by the name the user knows it by (``"statistic"``, a file, a layer).
        value: The offending value.
        problem: What is wrong with it, as a sentence without its final full stop.
        cure: What to do instead, likewise.
    """

    def __init__(self, field: str, value: Any, problem: str, cure: str) -> None:
        self.field, self.value, self.problem, self.cure = field, value, problem, cure
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{field} = {shown}: {problem}. {cure}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.problem, self.cure)


class MissingExtraError(TdqError):
    """A feature was used whose optional dependency is not installed."""


class TdqWarning(UserWarning):
    """Something works, but probably not as the user meant it; says what, where, and the cure."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of this package brings it.

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            "module",
            module,
            f"it is not installed ({error})",
            f"Install the extra that brings it: {install_command(extra)}",
        ) from error
