"""The one table of the demo: as text cells, and for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.lab.report.results import demo_model

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COLUMNS", "is_deployed", "results_table", "row_cells", "size_text"]

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
        "table",
        "Size of the scales that a deployment carries, as float32: one row, or one row per calibrated time. It is "
        "read once per step.",
    ),
    (
        "kernels",
        "Kernels that one call of the model launches in the TensorRT-RTX engine, which was built, not run. "
        "Scales over time should cost nearly none.",
    ),
    ("OpenVINO ms", "Median time of one call on this CPU, of a whole batch. See the notes for batch and threads."),
    ("speed vs FP32", "How many times faster than FP32 in the same run. 4-bit rows have the speed of W8A8."),
    (
        "time vs max",
        "Time against ModelOpt's static quantization in the same run; 1.00: following the diffusion time is free.",
    ),
)

#: For rows whose codes travel in INT8 tensors.
_AS_INT8 = "as W8A8"


def size_text(size: int) -> str:
    """``"200 B"``, ``"4.1 kB"``, ``"605 kB"``."""
    return f"{size} B" if size < 1000 else f"{size / 1000:.{1 if size < 100_000 else 0}f} kB"


def row_cells(row: dict[str, Any], deployed: bool) -> tuple[str, ...]:
    """One row of the table as text.

    Args:
        row: Of the results file.
        deployed: Whether the W8A8 rows have engines or times, so that others can refer to them.
    """
    low_bits = row["recipe"] not in ("fp32", "int8", "fp8") and deployed
    table, engine, openvino = row["table"], row["engine"], row["openvino"]
    unknown = _AS_INT8 if low_bits else "-"
    times = [unknown, "", ""] if low_bits else ["-", "-", "-"]
    if openvino:
        ratios = (openvino["speedup_over_fp32"], openvino["time_over_static"])
        shown = {"fp32": (), "max": ratios[:1]}.get(row["variant"], ratios)
        times = [f"{openvino['milliseconds']:.1f}", *(f"{ratio:.2f}" for ratio in shown), "-", "-"][:3]
    return (
        row["label"],
        row["name"],
        *(db_text(None if row[k] is None else float(row[k])) for k in ("sqnr_mean_db", "sqnr_worst_db", "psnr_db")),
        size_text(table["bytes"]) if table else "-",
        str(engine["kernels"]) if engine else unknown,
        *times,
    )


def is_deployed(results: dict[str, Any]) -> bool:
    """Whether some row has an engine or a time."""
    return any(row["engine"] or row["openvino"] for row in results["rows"])


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
    rows, deployed = results["rows"], is_deployed(results)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following["recipe"] != row["recipe"]
        cells = row_cells(row, deployed)
        label = cells[0] if row["variant"] in ("max", "fp32") else ""
        table.add_row(label, *cells[1:], style="bold" if row["variant"] == "tdq" else None, end_section=last)
    return table
