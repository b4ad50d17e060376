"""Every error that the package raises for a user's mistake, with its cure: read from the source, at build time.

``TdqError(field, value, problem, cure)`` is the only kind; what is written there is the registry. Texts that are made
at run time show their variable parts as ``…``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "modelopt_tdq"

#: Heading on the page, by the folder that raises.
FOLDERS = {
    "config": "Configs and recipes",
    "core": "Scale tables, files, arithmetic",
    "model": "The model and its calls",
    "calibration": "Calibration",
    "intervals": "Learned intervals",
    "training": "Quantization-aware training",
    "reconstruction": "Reconstruction",
    "temporal_features": "Temporal features",
    "analysis": "Analysis",
    "export": "Export",
    "plugin": "The TensorRT plugin",
    "runtime": "Engines and sessions",
    "compare": "Comparison",
    "pipeline": "Pipelines",
    "lab": "Demo, benchmarks and reports",
    "cli": "Command line",
}

_UNKNOWN = "…"


@dataclass(frozen=True, order=True)
class Entry:
    """A mistake.

    Attributes:
        folder: Of the package that raises it.
        field: What the user set.
        problem: What is wrong with it.
        cure: What to do instead.
        place: File and line.
    """

    folder: str
    field: str
    problem: str
    cure: str
    place: str


class _File:
    """One source file: its constants, so that texts with names in them can be shown."""

    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, ast.parse(path.read_text())
        self.constants: dict[str, ast.expr] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                self.constants[name] = node.value if name not in self.constants else ast.Constant(None)

    def text(self, node: ast.expr, depth: int = 0) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else _UNKNOWN if node.value is None else repr(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part, depth) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            inner = self.text(node.value, depth)
            return inner if isinstance(node.value, ast.Name) and inner != _UNKNOWN else _UNKNOWN
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left, depth) + self.text(node.right, depth)
        if isinstance(node, ast.IfExp):
            return f"{self.text(node.body, depth)} / {self.text(node.orelse, depth)}"
        if isinstance(node, ast.Name) and node.id in self.constants and depth < 3:
            return self.text(self.constants[node.id], depth + 1)
        return _UNKNOWN

    def entries(self, errors: set[str]) -> Iterator[Entry]:
        place = self.path.relative_to(PACKAGE)
        folder = place.parts[0].removesuffix(".py")
        for node in ast.walk(self.tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors):
                continue
            if len(node.args) < 4:  # a subclass that makes its own texts, or *parts
                continue
            field, _, problem, cure = (" ".join(self.text(part).split()) for part in node.args[:4])
            yield Entry(folder, field, problem, cure, f"{place.as_posix()}:{node.lineno}")


def registry() -> list[Entry]:
    """All of them, in the order of the page; those that say the same once."""
    found: dict[tuple[str, str, str, str], Entry] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for entry in _File(path).entries({"TdqError", "MissingExtraError"}):
            found.setdefault((entry.folder, entry.field, entry.problem, entry.cure), entry)
    order = list(FOLDERS)
    return sorted(
        found.values(), key=lambda e: (order.index(e.folder) if e.folder in order else len(order), e.field, e.problem)
    )


def _cell(text: str) -> str:
    return (
        text.replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("*", "\\*")
        .replace("`", "")
        .replace("<", "&lt;")
        .replace("_", "\\_")
        .replace("[", "\\[")
        .replace("$", "\\$")
    )


def error_tables() -> str:
    """The registry as Markdown: a table for each folder."""
    lines: list[str] = []
    entries = registry()
    for folder in dict.fromkeys(entry.folder for entry in entries):
        lines += [
            "",
            f"### {FOLDERS.get(folder, folder)}",
            "",
            "| what was set | what is wrong | what to do |",
            "|---|---|---|",
        ]
        for entry in (e for e in entries if e.folder == folder):
            lines.append(f"| {_cell(entry.field)} | {_cell(entry.problem)} | {_cell(entry.cure)} |")
    return "\n".join(lines)


def error_count() -> int:
    """How many there are."""
    return len(registry())
