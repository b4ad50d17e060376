"""The table of what people attach: every test that it names is there, and every row that claims something has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_LINES = (ROOT / "docs/works_with.md").read_text().splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in _LINES if line.startswith("| ")][1:]


def _tests(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_has_its_tests(row: list[str]) -> None:
    _, *claims, tests = row
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
    assert len(claims) == 3
    assert len(named) == tests.count("`") // 2
    assert bool(named) == any(claim not in ("not tested", "n/a") for claim in claims)
    for file, name in named:
        assert name in _tests(ROOT / file), f"{file}::{name}"


def test_the_table_is_read() -> None:
    assert len(ROWS) > 15
