"""The API reference: the public names, under the headings and in the order of ``modelopt_tdq/__init__.pyi``."""

from __future__ import annotations

import re
from pathlib import Path

_STUB = Path(__file__).resolve().parents[2] / "modelopt_tdq" / "__init__.pyi"


def sections() -> dict[str, list[tuple[str, str]]]:
    """Heading to the names below it, each with the module that defines it."""
    found: dict[str, list[tuple[str, str]]] = {}
    names: list[tuple[str, str]] = []
    for line in _STUB.read_text().splitlines():
        if line.startswith("# "):
            names = found.setdefault(line[2:].rstrip("."), [])
        elif match := re.match(r"from \.([\w.]+) import (\w+) as \w+", line):
            names.append((match[1], match[2]))
    return found


def _is_class(name: str) -> bool:
    return name[0].isupper() and not name.isupper() and "_" not in name


def api() -> str:
    """Directives of autodoc, a heading for each section."""
    lines: list[str] = []
    for heading, names in sections().items():
        lines += [f"## {heading}", "", "```{eval-rst}"]
        for _, name in names:
            if name.isupper():
                lines += [f".. py:data:: modelopt_tdq.{name}", "", f"   {_constant(name)}", ""]
            elif _is_class(name):
                members = "" if name.endswith("Config") else "   :members:\n"
                lines += [f".. autoclass:: modelopt_tdq.{name}", members, ""]
            else:
                lines += [f".. autofunction:: modelopt_tdq.{name}", ""]
        lines += ["```", ""]
        for _, name in names:
            if name.endswith("Config"):
                lines += [f"### Fields of `{name}`", "", *_fields(name), ""]
    return "\n".join(lines)


def _constant(name: str) -> str:
    if name == "RECIPES":
        return "Names of the recipes that come with the package, each a config for ``mtq.quantize``."
    return "A config for ``mtq.quantize``: see :func:`modelopt_tdq.recipe`."


def _fields(name: str) -> list[str]:
    """Of a config: name, default, meaning."""
    import modelopt_tdq

    lines = ["| field | default | |", "|---|---|---|"]
    for field, info in getattr(modelopt_tdq, name).model_fields.items():
        default = info.get_default(call_default_factory=True)
        text = ". ".join(part.rstrip(".") for part in (info.title, info.description) if part)
        text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        lines.append(f"| `{field}` | `{default!r}` | {text} |")
    return lines
