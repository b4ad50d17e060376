"""What all plots share: colours, type size, a figure without global state, and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
    """Write a PNG, in a folder that is made if need be; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def short_name(name: str) -> str:
    """A quantizer's name, short enough for a label."""
    return name.removesuffix(".input_quantizer").replace("_blocks", "").replace("attentions", "attn")
