"""What messages tell a user to call is there, and public."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelopt_tdq as tdq

PACKAGE = Path(__file__).resolve().parents[1] / "modelopt_tdq"

#: A dotted name behind the package's own, or behind the alias that the README gives it.
_NAME = re.compile(r"\b(modelopt_tdq|tdq)((?:\.[A-Za-z_]\w*)+)")

#: Roles of Sphinx in docstrings.
_REFERENCE = re.compile(r":\w+:`~?(modelopt_tdq(?:\.\w+)+)`")


def _files() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield str(file.relative_to(PACKAGE)), ast.parse(file.read_text())


def _docstrings(tree: ast.Module) -> set[int]:
    """Ids of the strings that stand alone: docstrings."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _texts(tree: ast.Module) -> Iterator[str]:
    """Strings that are shown; not docstrings, nor what is nothing but a dotted name: a key in a file, a module."""
    docstrings = _docstrings(tree)
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    for node in strings:
        if isinstance(node.value, str) and not _NAME.fullmatch(node.value):
            yield node.value


def _is_there(dotted: str) -> bool:
    """Whether it is a module, or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def _is_command(name: str, text: str) -> bool:
    """Whether it is a module that is run, ``python -m``, or source code that is named in a generated file."""
    return f"python -m {name}" in text or f"Written by {name}" in text


def test_messages_name_only_what_is_public() -> None:
    named = {
        (file, f"modelopt_tdq{match[2]}")
        for file, tree in _files()
        for text in _texts(tree)
        for match in _NAME.finditer(text)
        if not _is_command(match[0], text)
    }
    assert len(named) > 10
    assert not [(file, name) for file, name in named if name.split(".")[1] not in {*tdq.__all__, "__version__"}]
    assert not [(file, name) for file, name in named if not _is_there(name)]


def test_docstrings_refer_to_what_is_there() -> None:
    named = {
        (file, match[1])
        for file, tree in _files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in _REFERENCE.finditer(node.value)
    }
    assert len(named) > 20
    assert not [(file, name) for file, name in named if not _is_there(name)]


@pytest.mark.parametrize(
    ("name", "there"),
    [("modelopt_tdq.make_config", True), ("modelopt_tdq.export.nothing", False), ("nowhere.a", False)],
)
def test_what_is_there_is_told_from_what_is_not(name: str, there: bool) -> None:
    assert _is_there(name) == there
