"""A comparison as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelopt_tdq.compare.model import ModelComparison

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["render"]

#: Rows of the table of layers; a fault in a row of the table usually shows in every layer.
_MOST_LAYERS = 12


def render(comparison: ModelComparison) -> RenderableType:
    """One row per time step, one column per backend; then the layers whose codes rounding does not explain."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    backends = list(dict.fromkeys(step.backend for step in comparison.steps))
    title = "How far each output is from the reference's, and quantization noise itself (dB below the signal)"
    outputs = Table()
    outputs.add_column("time", justify="right")
    outputs.add_column("noise", justify="right")
    for backend in backends:
        outputs.add_column(backend, justify="right")
    for time in dict.fromkeys(step.time for step in comparison.steps):
        row = [step for step in comparison.steps if step.time == time]
        cells = []
        for step in row[: len(backends)]:
            colour = "green" if step.difference else "red"
            mark = "" if step.difference else " FAILED"
            cells.append(f"[{colour}]{step.difference.sqnr_db:.1f}{mark}[/]")
        outputs.add_row(f"{time:g}", f"{row[0].difference.noise_db:.1f}", *cells)

    lines = []
    for backend, count in comparison.compared_codes.items():
        moved = sum(layer.difference.differing for layer in comparison.layers if layer.backend == backend)
        lines.append(f"{backend}: {moved} of {count} codes differ, with the reference's codes in all other layers")
    if not comparison.faults:
        verdict = "[green]passed[/]" if comparison.passed else "[red]FAILED[/]"
        return Group(title, outputs, *lines, verdict)
    layers = Table()
    for column in ("time", "backend", "quantizer", "differing", "of", "largest step"):
        layers.add_column(column, justify="left" if column in ("backend", "quantizer") else "right")
    for layer in comparison.faults[:_MOST_LAYERS]:
        d = layer.difference
        layers.add_row(f"{layer.time:g}", layer.backend, escape(d.name), str(d.differing), str(d.count), str(d.largest))
    more = len(comparison.faults) - _MOST_LAYERS
    heading = "Layers whose codes rounding does not explain, in the order they run:"
    rest = [f"and {more} more"] if more > 0 else []
    return Group(title, outputs, *lines, heading, layers, *rest, "[red]FAILED[/]")
