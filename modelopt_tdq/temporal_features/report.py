"""What temporal feature maintenance chose, what it is worth, and what it costs: a table with a row per feature."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.temporal_features.block import TemporalBlock, named
from modelopt_tdq.temporal_features.runtime import feature_table

__all__ = [
    "COLUMNS",
    "MEASURED",
    "FeatureRow",
    "TemporalReport",
    "cache_memory",
    "error_db",
    "memory_text",
    "temporal_report",
]

_log = logging.getLogger(__name__)

#: What errors are known of, in the order in which they are shown.
MEASURED = ("naive", "tib", "cache", "chosen")

#: Of the table; the errors are "mean / worst" over the rows.
COLUMNS = (
    "feature",
    "channels",
    "chosen",
    *(f"{what} error, dB" for what in MEASURED),
    *(f"{what} least cosine" for what in MEASURED),
)

_OUTSIDE = {
    "nearest": "the nearest row",
    "linear": "interpolated between the neighbouring rows",
    "exact": "computed by the model's own layers",
}


def error_db(error: float) -> float:
    """``10 log10`` of a relative squared error, which is a ratio of powers; minus infinity for 0."""
    return 10.0 * math.log10(error) if error > 0.0 else -math.inf


def cache_memory(block: TemporalBlock, rows: int, bits: int) -> int:
    """Bytes of a cache of the block's features, before it is built.

    ``rows x (channels x bits / 8 + 8)``, added up over the features: each row of at most 8 bits per value has a float32
    scale and a float32 offset, and ends on a whole byte; wider values are floats, without scales. The estimate is also
    logged (INFO).

    Args:
        block: From :func:`modelopt_tdq.find_temporal_block`.
        rows: Number of times.
        bits: Of a value: 2 to 8, 16 or 32.

    Raises:
        TdqError: No rows, or ``bits`` is no format of a cache.
    """
    if rows < 1:
        raise TdqError("rows", rows, "a table has at least one", "Pass the number of times")
    if bits not in (*range(2, 9), 16, 32):
        raise TdqError("bits", bits, "no format of a cache", "Use 2 to 8, 16 or 32")
    channels = [math.prod(shape) for shape in block.features.values()]
    scales = 8 if bits <= 8 else 0
    size = rows * sum(math.ceil(count * bits / 8) + scales for count in channels)
    _log.info(
        "cache of %d temporal features, %d channels, %d rows, %d bits: %s",
        *(len(channels), sum(channels), rows, bits, memory_text(size)),
    )
    return size


def memory_text(size: int) -> str:
    """``"640 B"``, ``"3.1 kB"``, ``"1.0 MB"``."""
    for unit, bytes_in in (("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_in:
            return f"{size / bytes_in:.1f} {unit}"
    return f"{size} B"


@dataclass(frozen=True)
class FeatureRow:
    """One temporal feature.

    Attributes:
        layer: That makes it.
        channels: Numbers per sample.
        rows: Number of rows by the strategy that was chosen for them: ``{"tib": 12, "cache": 8}``.
        mean_db: By strategy, and "chosen": relative squared error over all rows, mean, in dB. NaN where unknown.
        worst_db: Likewise, of the worst row.
        cosine: Likewise, the least cosine similarity of a row.
    """

    layer: str
    channels: int
    rows: Mapping[str, int]
    mean_db: Mapping[str, float]
    worst_db: Mapping[str, float]
    cosine: Mapping[str, float]

    @property
    def chosen(self) -> str:
        """``"tib"``, or ``"tib 12 / cache 8"`` where rows were decided one by one."""
        if len(self.rows) == 1:
            return next(iter(self.rows))
        return " / ".join(f"{strategy} {count}" for strategy, count in self.rows.items())

    def cells(self) -> tuple[str, ...]:
        """As text, one for each of :data:`COLUMNS`."""
        errors = [
            f"{db_text(self.mean_db[what])} / {db_text(self.worst_db[what])}" if what in self.mean_db else "-"
            for what in MEASURED
        ]
        cosines = [f"{self.cosine[what]:.5f}" if what in self.cosine else "-" for what in MEASURED]
        return (self.layer, str(self.channels), self.chosen, *errors, *cosines)


@dataclass(frozen=True)
class TemporalReport:
    """The temporal features of a model; ``str()`` gives it as a table.

    Attributes:
        features: A row each, in order of execution.
        parameters: Weights and biases that the table replaces.
        multiply_adds: Likewise, for one time.
        nbytes: Of the table as deployed.
        packed_nbytes: Of the table with codes of less than 8 bits packed.
        rows: Number of times.
        outside: What a time gets that is no row: "nearest", "linear" or "exact".
        refused: Layers that depend on the time and on no other tensor, but on what no table can hold: a number or flag
            among the arguments, a size, what earlier calls leave behind. By name, on what; they run as any other layer.
    """

    features: tuple[FeatureRow, ...]
    parameters: int
    multiply_adds: int
    nbytes: int
    packed_nbytes: int
    rows: int
    outside: str
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What stands below the table, a sentence each."""
        when = "Where a time is a row, the table" if self.outside == "exact" else "The table"
        size = f"{memory_text(self.nbytes)} in {self.rows} rows"
        if self.packed_nbytes < self.nbytes:
            size += f" ({memory_text(self.packed_nbytes)} if its codes were packed)"
        lines = [
            f"{when} replaces {self.parameters:,} parameters and {self.multiply_adds:,} multiply-adds.",
            f"It takes {size}; a time that is no row is {_OUTSIDE[self.outside]}.",
        ]
        if any("tib" in row.rows for row in self.features):
            lines.append("A TIB feature is deployed as the table of its outputs, without its layers.")
        for layer, on in self.refused.items():
            lines.append(f"{layer} is no temporal feature: besides the time it depends on {named(on)}.")
        lines.append("Errors: relative squared error, mean / worst over the rows; lower is better.")
        return lines

    def __str__(self) -> str:
        """The table, as plain text."""
        cells = [COLUMNS, *(row.cells() for row in self.features)]
        heads = [heading.partition(" ") for heading in COLUMNS]
        shown = [[first for first, _, _ in heads], [second for _, _, second in heads], *cells[1:]]
        widths = [max(len(row[column]) for row in shown) for column in range(len(COLUMNS))]
        lines = [
            "  ".join(
                text.ljust(width) if column in (0, 2) else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in shown
        ]
        lines.insert(2, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, "", *self.notes()])


def temporal_report(model: nn.Module) -> TemporalReport:
    """What ``{"method": "tdq_temporal"}`` chose for the temporal features of ``model``, and what that is worth.

    Args:
        model: Quantized by it, with ``maintenance`` "tib", "cache" or "auto"; or restored.

    Raises:
        TdqError: The model has no temporal features, they were not loaded, or they were not made by that algorithm.
    """
    model = unwrapped(model)
    table = feature_table(model)
    metadata = table.metadata
    wanted = ("strategy", "relative_squared_error", "cosine_similarity", "superseded")
    if missing := [key for key in wanted if key not in metadata]:
        raise TdqError("metadata", missing, "not in the table", "Use a table made by the tdq_temporal algorithm")
    errors, cosines = metadata["relative_squared_error"], metadata["cosine_similarity"]
    rows = []
    for name, feature in table.features.items():
        measured = [what for what in MEASURED if what in errors]
        rows.append(
            FeatureRow(
                name,
                math.prod(feature.row_shape),
                dict(Counter(metadata["strategy"][name])),
                {what: error_db(_mean(errors[what][name])) for what in measured},
                {what: error_db(max(errors[what][name])) for what in measured},
                {what: min(cosines[what][name]) for what in measured},
            )
        )
    layers = [model.get_submodule(name) for name in dict.fromkeys([*metadata["superseded"], *table.features])]
    return TemporalReport(
        tuple(rows),
        sum(_parameters(layer) for layer in layers),
        int(metadata.get("multiply_adds") or sum(_products(layer) for layer in layers)),
        table.nbytes,
        table.packed_nbytes,
        len(table),
        table.outside,
        {name: tuple(on) for name, on in metadata.get("refused", {}).items()},
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _products(layer: Any) -> int:
    """Multiply-adds of one call for one sample, of a linear layer; by its sizes, as its weights may have been freed."""
    return int(layer.in_features * layer.out_features) if isinstance(layer, nn.Linear) else 0


def _parameters(layer: Any) -> int:
    if isinstance(layer, nn.Linear):
        return _products(layer) + (0 if layer.bias is None else layer.out_features)
    if isinstance(layer, _ConvNd):
        weights = layer.in_channels // layer.groups * layer.out_channels * math.prod(layer.kernel_size)
        return weights + (0 if layer.bias is None else layer.out_channels)
    return sum(parameter.numel() for parameter in layer.parameters())
