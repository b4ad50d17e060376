"""The one table of the demo: as text cells, and for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.lab.report.results import demo_model
from modelopt_tdq.lab.report.verdict import verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["COLUMNS", "print_verdict", "results_table", "row_cells", "size_text"]

#: Heading, and what the number means.
COLUMNS = (
    ("bits", "Bits of weights (W) and activations (A)."),
    ("scales", "How the activation scales were chosen; layers, bits and seeds are the same in all rows of a group."),
    (
        "SQNR mean dB",
        "Power of the full-precision prediction over the power of the error, on held-out full-precision "
        "trajectories; mean over the steps. 6 dB more is half the error.",
    ),
    ("SQNR worst dB", "The same at the worst step. Where noise is predicted, usually the last one: it has least."),
    (
        "PSNR dB",
        "Final images against the full-precision images of the same seeds, each model on its own trajectory. Errors "
        "add up over the steps, so it is not a function of the SQNR.",
    ),
    (
        "time / static",
        "Time of one call in OpenVINO against ModelOpt's static quantization in the same run; 1.00: following the "
        "diffusion time is free.",
    ),
    ("speed / FP32", "How many times faster than FP32 in the same run. 4-bit rows have the speed of W8A8."),
    (
        "call ms",
        "Median time of one call in OpenVINO on this CPU, of a whole batch. See the notes for batch and threads.",
    ),
    (
        "kernels",
        "Kernels that one call of the model launches in the TensorRT-RTX engine, which was built, not run. "
        "Scales over time should cost nearly none.",
    ),
    (
        "table",
        "Size of what a deployment carries as float32, one row or one per calibrated time: scales, shifts of channels, "
        "corrections. One row of it is read per step.",
    ),
)


def size_text(size: int) -> str:
    """``"200 B"``, ``"4.1 kB"``, ``"605 kB"``."""
    return f"{size} B" if size < 1000 else f"{size / 1000:.{1 if size < 100_000 else 0}f} kB"


def row_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table as text; what was not measured is a dash.

    Args:
        row: Of the results file.
    """
    table, engine, openvino = row["table"], row["engine"], row["openvino"]
    times = ["-", "-", "-"]
    if openvino:
        milliseconds = openvino["milliseconds"]
        times[2] = f"{milliseconds:.{1 if milliseconds < 100 else 0}f}"
        if row["variant"] != "fp32":
            times[1] = f"{openvino['speedup_over_fp32']:.2f}"
        if row["variant"] not in ("fp32", "max"):
            times[0] = f"{openvino['time_over_static']:.2f}"
    return (
        row["label"],
        row["name"],
        *(db_text(None if row[k] is None else float(row[k])) for k in ("sqnr_mean_db", "sqnr_worst_db", "psnr_db")),
        *times,
        str(engine["kernels"]) if engine else "-",
        size_text(table["bytes"]) if table else "-",
    )


def results_table(results: dict[str, Any]) -> Table:
    """The table for the terminal."""
    from rich import box
    from rich.table import Table

    title = f"{demo_model(results)['title']}, against full precision"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False
    )
    for index, (heading, _) in enumerate(COLUMNS):
        table.add_column(heading.replace(" ", "\n"), justify="left" if index < 2 else "right", no_wrap=True)
    rows = results["rows"]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following["recipe"] != row["recipe"]
        cells = row_cells(row)
        label = cells[0] if row["variant"] in ("max", "fp32") else ""
        table.add_row(label, *cells[1:], style="bold" if row["variant"] == "tdq" else None, end_section=last)
    return table


def print_verdict(results: dict[str, Any], console: Console) -> None:
    """What the table comes to, below it."""
    found = verdict(results)
    console.print(found.headline, style="bold", highlight=False)
    for fact in found.facts:
        console.print(f"- {fact}", highlight=False)
