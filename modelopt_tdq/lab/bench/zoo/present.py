"""The matrix as Markdown: counts, a row per class, and the misses by their causes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.lab.bench.zoo.judge import FLOAT32_DB, MARGIN_DB
from modelopt_tdq.lab.bench.zoo.stage import FAILED, NONE, NOT_RUN, REFUSED, RIGHT, WRONG, Cell
from modelopt_tdq.lab.bench.zoo.stages import STAGES
from modelopt_tdq.lab.provenance import provenance_line

__all__ = ["markdown", "summary"]

#: A class and its row in the results; None if it was not run.
Rows = Mapping[str, Mapping[str, Any] | None]

_VERDICTS = (RIGHT, WRONG, REFUSED, FAILED, NOT_RUN, NONE)

#: Characters of a reason.
_LENGTH = 300


def _db(cell: Cell, name: str = "db") -> str:
    return db_text(None if cell.get(name) is None else float(cell[name]))


def _quantize(cell: Cell) -> str:
    left_out = f", {len(cell['left_out'])} left out" if cell["left_out"] else ""
    return (
        f"{_db(cell, 'sqnr_db')} ({_db(cell, 'static_db')}); {cell['quantized']} of {cell['layers']} layers{left_out}, "
        f"{100 * cell['share_of_weights']:.0f} % of weights, {cell['temporal']} by time"
    )


def _temporal(cell: Cell) -> str:
    return f"{cell['features']} of {cell['layers']} layers, {cell.get('by') or _db(cell) + ' dB'}"


def _fixed(cell: Cell) -> str:
    """Inputs that are part of the graph, and no inputs of it."""
    return f"; constant: {', '.join(cell['constants'])}" if cell.get("constants") else ""


def _export(cell: Cell) -> str:
    return f"{cell['low_precision']} quantizers{_fixed(cell)}"


def _output(cell: Cell) -> str:
    return _db(cell) + (f", {cell['by']}" if "by" in cell else "")


def _tensorrt(cell: Cell) -> str:
    return f"{cell['low_precision']} of {cell['layers']}, {cell['kernels']} kernels{_fixed(cell)}"


#: Columns: stage, heading, and what a cell of the verdict RIGHT or WRONG says.
_COLUMNS: tuple[tuple[str, str, Callable[[Cell], str]], ...] = (
    ("quantize", "SQNR (static), dB; quantized", _quantize),
    ("restore", "restored", lambda cell: "equal"),
    ("temporal", "temporal features", _temporal),
    ("export", "exported", _export),
    ("onnxruntime", "ONNX Runtime, dB", _output),
    ("openvino", "OpenVINO, dB", _output),
    ("tensorrt_rtx", "TensorRT-RTX", _tensorrt),
    ("temporal_export", "with features, dB", _output),
)


def _cell(cell: Cell | None, text: Callable[[Cell], str]) -> str:
    if cell is None:
        return "-"
    verdict = str(cell["verdict"])
    if verdict == RIGHT:
        return text(cell)
    return verdict if verdict in (NONE, NOT_RUN) else f"**{verdict}**"


def _counts(rows: Rows) -> Iterator[str]:
    yield "| stage | right | " + " | ".join(_VERDICTS[1:]) + " |"
    yield "|---|" + "--:|" * len(_VERDICTS)
    for stage in STAGES.values():
        verdicts = [
            row["stages"][stage.name]["verdict"] for row in rows.values() if row and stage.name in row["stages"]
        ]
        if verdicts:
            others = [str(verdicts.count(verdict) or "") for verdict in _VERDICTS[1:]]
            right = f"{verdicts.count(RIGHT)} of {len(verdicts) - verdicts.count(NONE)}"
            yield f"| {stage.name}: {stage.shows} | {right} | {' | '.join(others)} |"


def _matrix(rows: Rows) -> Iterator[str]:
    yield "| class | " + " | ".join(heading for _, heading, _ in _COLUMNS) + " | s |"
    yield "|---|" + "---|" * len(_COLUMNS) + "--:|"
    for name, row in rows.items():
        if row is None:
            continue
        cells = [_cell(row["stages"].get(stage), text) for stage, _, text in _COLUMNS]
        yield f"| {name} | {' | '.join(cells)} | {row['seconds']:.0f} |"


def _shown(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= _LENGTH else line[: _LENGTH - 3] + "..."


def _misses(rows: Rows) -> Iterator[str]:
    """By stage and cause: the same words, whatever names and numbers are in them."""
    causes: dict[tuple[str, str, str], list[tuple[str, Cell]]] = {}
    for name, row in rows.items():
        for stage, cell in (row["stages"] if row else {}).items():
            if cell["verdict"] in (WRONG, REFUSED, FAILED):
                words = re.sub(r"'[^']*'|[-\d.]*\d", "", cell["reason"])[:_LENGTH]
                causes.setdefault((stage, cell["verdict"], words), []).append((name, cell))
    if not causes:
        yield "None."
    for (stage, verdict, _), found in sorted(
        causes.items(), key=lambda item: (list(STAGES).index(item[0][0]), item[0])
    ):
        first = found[0][1]
        told = f" ({first['told']})" if "told" in first else ""
        names = ", ".join(name for name, _ in found)
        yield f"- **{stage}**, {verdict}, {len(found)}: {names}. {_shown(first['reason'])}{told}"


def _left_out(rows: Rows) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        for layer, reason in (row["stages"].get("quantize", {}).get("left_out", {}) if row else {}).items():
            reasons.setdefault(reason, []).append(f"{name}: {layer}")
    for reason, layers in reasons.items():
        yield f"- {_shown(reason)}: {len(layers)}, the first {layers[0]}"


def summary(rows: Rows) -> str:
    """The matrix in a sentence."""
    stages = [row["stages"] for row in rows.values() if row is not None]

    def right(*names: str) -> int:
        return sum(all(cells.get(name, {}).get("verdict") == RIGHT for name in names) for cells in stages)

    return (
        f"Of the {len(stages)} classes of diffusers whose `forward` takes a time, {right('quantize')} calibrate, "
        f"{right('save', 'restore')} are saved and restored bit for bit, {right('export')} are exported, "
        f"{right('onnxruntime')} are right in ONNX Runtime and {right('openvino')} in OpenVINO, and TensorRT-RTX "
        f"builds {right('tensorrt_rtx')} with every quantized layer in low precision"
    )


def markdown(rows: Rows) -> str:
    """Counts, the matrix, the misses, the layers that were left out, and where the results come from.

    Args:
        rows: By class; what was not run is counted.
    """
    absent = [name for name, row in rows.items() if row is None]
    sources = dict.fromkeys(
        provenance_line({**row["source"], "command": "modelopt-tdq bench zoo"}) for row in rows.values() if row
    )
    lines = [
        "# The zoo",
        "",
        "A tiny model with random weights of every class of diffusers that takes a time, W8A8, scales over five times, "
        "by maximum; judged on a call at one of them, with other noise. SQNR: the quantized model to full precision; "
        "in brackets ModelOpt's static scales, calibrated on the same call at this time. Backends: to the quantized "
        f"torch model, lowest of the outputs. ONNX Runtime is right from {FLOAT32_DB:g} dB, float32's own rounding; "
        "where that moves codes and a random network amplifies it, right are equal codes in every layer. OpenVINO is "
        f"right {MARGIN_DB:g} dB below the quantization noise, or as near as ONNX Runtime. TensorRT-RTX: "
        "built for SM 8.9, not run; layers in low precision. With features: the model whose temporal features come "
        "from a table, exported, in ONNX Runtime.",
        "",
        f"{len(rows) - len(absent)} of {len(rows)} classes run" + (f", {absent[0]} and others not." if absent else "."),
        f"{summary(rows)}.",
        "",
        *_counts(rows),
        "",
        "## Classes",
        "",
        *_matrix(rows),
        "",
        "## Misses",
        "",
        *_misses(rows),
    ]
    left_out: Sequence[str] = list(_left_out(rows))
    if left_out:
        lines += ["", "## Layers that the config quantizes and that stay in floating point", "", *left_out]
    return "\n".join([*lines, "", *sources])
