"""An analysis as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelopt_tdq.analysis import Analysis, Proposal
from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.lab.report.plots import scales_over_time, sqnr_per_step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["analysis_tables", "draw_analysis", "proposal_lines"]

#: Layers shown in a table; the file has all of them.
_SHOWN = 12

_NAMES = {"max": "static max", "static": "best static", "tdq": "over time"}


def analysis_tables(analysis: Analysis) -> RenderableType:
    """Headroom, sensitivity and the verdict, for a ``rich.console.Console``."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_headroom(analysis)]
    if analysis.sensitivity:
        parts.append(_sensitivity(analysis))
    parts.append(Text(analysis.verdict, style="bold"))
    return Group(*parts)


def _table(title: str, columns: Iterable[str], caption: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        layer = column == "layer"
        table.add_column(column, justify="left" if layer else "right", overflow="fold" if layer else "ellipsis")
    return table


def _headroom(analysis: Analysis) -> Table:
    table = _table(
        f"Headroom: {min(_SHOWN, len(analysis.layers))} of {len(analysis.layers)} quantizers",
        ("layer", "one scale loses, dB", "SQNR, dB", "spread moves by"),
        "dB of the layer's output against a scale per step. Spread: ratio of the standard deviations over time.",
    )
    for layer in analysis.layers[:_SHOWN]:
        name = layer.name.removesuffix(".input_quantizer")
        table.add_row(name, db_text(layer.loss_db, 2), db_text(layer.sqnr_db), f"{layer.spread_ratio:.1f}x")
    return table


def _sensitivity(analysis: Analysis) -> Table:
    static = {s.name: s for s in analysis.sensitivity["static"]}
    estimated = sum(s.estimated for s in static.values())
    how = (
        "Estimated by backward passes" + (f" for {estimated} layers, else measured" if estimated < len(static) else "")
        if estimated
        else "Measured"
    )
    times = ", ".join(f"{time:g}" for time in analysis.probe_times)
    table = _table(
        f"Sensitivity: the {min(_SHOWN, len(static))} most delicate of {len(static)} layers",
        ("layer", "input, static", "input, over time", "weights"),
        f"SQNR of the model's output in dB with that part alone quantized; the worst of the times {times}. {how}.",
    )
    for temporal in analysis.sensitivity["temporal"][:_SHOWN]:
        alone = static[temporal.name]
        table.add_row(
            temporal.name,
            *(_worst(values) for values in (alone.activation_db, temporal.activation_db, temporal.weight_db)),
        )
    return table


def _worst(decibels: Sequence[float]) -> str:
    return db_text(min(decibels)) if decibels else db_text(None)


def proposal_lines(proposals: dict[str, Proposal]) -> list[str]:
    """The layers to keep in high precision, static and over time, as rules to paste; lines not to be wrapped."""
    lines = []
    for kind, label in (("static", "static scales"), ("temporal", "scales over time")):
        if kind not in proposals:
            continue
        proposal = proposals[kind]
        reached = "reaches" if proposal.reached else "does not reach"
        count = len(proposal.layers)
        lines.append(
            f"With {label}, keeping {count} layer{'' if count == 1 else 's'} in high precision {reached} "
            f"{proposal.target_db:g} dB (measured {', '.join(db_text(v) for v in proposal.sqnr_db)}):"
        )
        lines += [f"    {rule!r}," for rule in proposal.rules]
    if any(proposal.rules for proposal in proposals.values()):
        lines.append('Append the rules to config["quant_cfg"].')
    return lines


def draw_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw the SQNR over time, and the scales of the layers with most headroom.

    Args:
        analysis: What to draw.
        folder: Where to.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    times = list(analysis.times)
    curves = {"max": analysis.max_db, "static": analysis.static_db, "tdq": analysis.temporal_db}
    panel = {variant: (_NAMES[variant], list(values)) for variant, values in curves.items()}
    first = sqnr_per_step({"Output, on calibration inputs": panel}, times, folder / "sqnr.png")
    layers = analysis.layers[:10]
    if not layers:
        return [first]
    scale = torch.tensor([layer.scale for layer in layers]).T
    names = [layer.name for layer in layers]
    second = scales_over_time(names, torch.tensor(times), {"tdq": ("best scale", scale)}, folder / "scales.png")
    spread = torch.tensor([layer.spread for layer in layers]).T
    third = scales_over_time(
        names, torch.tensor(times), {"static": ("standard deviation of the input", spread)}, folder / "spread.png"
    )
    return [first, second, third]
