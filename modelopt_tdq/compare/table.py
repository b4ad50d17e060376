"""A comparison as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelopt_tdq.compare.metrics import TOLERANCES
from modelopt_tdq.compare.results import LayerResult, ModelComparison

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["first_fault", "render"]

#: Rows of the table of layers; a fault in a row of the table usually shows in every layer.
_MOST_LAYERS = 12


def first_fault(layer: LayerResult) -> str:
    """One line on the first layer that rounding does not explain."""
    return (
        f"First faulty layer: {layer.name} in {layer.backend}, at time {layer.time:g} "
        f"(step {layer.step}): {layer.difference}"
    )


def render(comparison: ModelComparison) -> RenderableType:
    """What is allowed; one row per time step, one column per backend; then the layers that rounding does not explain.

    The verdict, and the first faulty layer, are the last lines.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [TOLERANCES, *map(Text, comparison.notes), _outputs(comparison)]
    for backend, count in comparison.compared_codes.items():
        moved = sum(codes.differing for codes in comparison.codes(backend))
        parts.append(f"{backend}: {moved} of {count} codes differ, with the reference's codes in all other layers")
    if comparison.faults:
        layers = Table(
            title="Layers whose codes rounding does not explain, in the order they run", title_justify="left"
        )
        for column in ("time", "backend", "layer", "found"):
            layers.add_column(column, justify="right" if column == "time" else "left", overflow="fold")
        for layer in comparison.faults[:_MOST_LAYERS]:
            layers.add_row(f"{layer.time:g}", layer.backend, Text(layer.name), Text(str(layer.difference)))
        parts.append(layers)
        if len(comparison.faults) > _MOST_LAYERS:
            parts.append(f"and {len(comparison.faults) - _MOST_LAYERS} more")
        parts.append(Text(first_fault(comparison.faults[0]), style="bold red"))
    parts += [Text(str(failure), style="bold red") for failure in comparison.failures]
    parts.append("[green]passed[/]" if comparison.passed else "[red]FAILED[/]")
    return Group(*parts)


def _outputs(comparison: ModelComparison) -> RenderableType:
    from rich.table import Table

    backends = list(dict.fromkeys(step.backend for step in comparison.steps))
    outputs = Table(
        title="Difference from the reference's output, and the quantization noise that it may not exceed: dB below the "
        "signal",
        title_justify="left",
    )
    outputs.add_column("time", justify="right")
    outputs.add_column("noise", justify="right")
    for backend in backends:
        outputs.add_column(backend, justify="right")
    for number in dict.fromkeys(step.step for step in comparison.steps):
        row = [step for step in comparison.steps if step.step == number]
        cells = []
        for step in row:
            colour = "green" if step.difference else "red"
            mark = "" if step.difference else " FAILED"
            cells.append(f"[{colour}]{step.difference.sqnr_db:.1f}{mark}[/]")
        outputs.add_row(f"{row[0].time:g}", f"{row[0].difference.noise_db:.1f}", *cells)
    return outputs
