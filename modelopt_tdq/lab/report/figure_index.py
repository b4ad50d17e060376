"""A Markdown page with figures, their captions, how they were made, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelopt_tdq.core.files import write_text

__all__ = ["IndexedFigure", "write_index"]


@dataclass(frozen=True)
class IndexedFigure:
    """A figure in the index.

    Attributes:
        title: Its heading.
        file: The image, relative to the page.
        caption: Below it.
    """

    title: str
    file: str
    caption: str


def write_index(path: Path, facts: Mapping[str, str], figures: Sequence[IndexedFigure], missing: Sequence[str]) -> Path:
    """Write the page.

    Args:
        path: Of the Markdown file, in the folder of the images.
        facts: How the figures were made, by name.
        figures: In order.
        missing: What could not be drawn, and why; a sentence each.
    """
    lines = ["# Figures of the TDQ supplementary, on this model", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## What is missing", "", *(f"- {sentence}" for sentence in missing or ["Nothing."])]
    for figure in figures:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}]({figure.file})", "", figure.caption]
    return write_text(path, "\n".join(lines) + "\n")
