"""What all plots share: colours, type size, a figure without global state, and writing it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Literal

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import require

__all__ = ["COLORS", "FONT", "new_figure", "save_figure", "short_name"]

#: Color-blind safe (Okabe-Ito), one per way of calibrating.
COLORS = {"max": "#E69F00", "static": "#0072B2", "tdq": "#009E73"}

#: Points.
FONT = 8


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """A figure drawn by Agg, without pyplot's global state."""
    require("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = 100) -> Path:
    """Write a PNG, or an SVG that follows light and dark, in a folder that is made if need be; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        return write_text(path, _themed(figure, path.stem))
    figure.savefig(path, dpi=dpi)
    return path


#: Black becomes the colour of the text, which depends on the reader's light or dark mode; paper is always light.
_THEME = """<style>
svg { color: #1c2128; }
text { fill: currentColor; }
@media screen and (prefers-color-scheme: dark) { svg { color: #e6eaee; } }
</style>"""


def _themed(figure: Any, name: str) -> str:
    from matplotlib import rc_context

    drawn = io.StringIO()
    # text as text; the same file for the same figure
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "image.composite_image": False}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue().replace("#000000", "currentColor")
    head, svg = re.split(r"(?=<svg)", text, maxsplit=1)
    opening, inside = re.split(r"(?<=>)", svg, maxsplit=1)
    return f"{head}{opening}{_THEME}{inside}"


def short_name(name: str) -> str:
    """A quantizer's name, short enough for a label."""
    return name.removesuffix(".input_quantizer").replace("_blocks", "").replace("attentions", "attn")
