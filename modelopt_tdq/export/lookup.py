"""The time of the call, as a row of the table: one Gather for the whole graph."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.spec import ActivationSpec, QuantizationSpec
from modelopt_tdq.model.token_times import Layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ColumnSource", "Lookup", "TimeRow", "gathered", "power_of_two", "reference_scale", "split_columns"]

_Array = np.ndarray[Any, np.dtype[np.float32]]

#: One row of the activation for each time.
_ONE_ROW = Layout(0)


def power_of_two(least: Any) -> Any:
    """The power of two at or below each number, float32; 1 for numbers below the smallest normal float32, or infinite.

    By the exponent's bits: a float32 logarithm of the number just below a power of two is that of the power.
    """
    least = np.asarray(least, dtype=np.float32)
    usable = (least >= np.finfo(np.float32).tiny) & np.isfinite(least)
    return np.where(usable, np.ldexp(np.float32(0.5), np.frexp(least)[1]), np.float32(1.0)).astype(np.float32)


def reference_scale(spec: ActivationSpec) -> np.float32:
    """s_ref: the power of two at or below the smallest scale that turns codes back, s'.

    ``s' / s_ref`` is at least 1, so that nothing overflows in front of it that would not behind it; and it is
    exact in float32, so that the lowering adds no rounding of its own to any scale.
    """
    return np.float32(power_of_two(spec.value_scale.min()))


class TimeRow:
    """The time of the call, and its row of the table: made when first asked for, once for the whole graph.

    Args:
        editor: Of the graph.
        edges: [K - 1] float32, half-way points between the rows; or a value of the graph that holds [K], the last of
            them infinite.
        timestep: Graph input that holds the time; None if nothing will ask for it.
        times: Number of times T per call; None if that is the dynamic batch.
        anchor: The node before which everything is inserted; the first of the graph if not given.
        of_tokens: Whether the times [B, N, ...] are those of tokens or frames, T = B * N in one row.

    Attributes:
        anchor: That node.
        size: T, or the name of the dynamic batch, or of as many times.
        taken: The constant table [K, M, 1, 1] that :func:`gathered` took the row of, and its M parts; else None.
    """

    def __init__(
        self,
        editor: GraphEditor,
        edges: _Array | ir.Value,
        timestep: ir.Value | None,
        times: int | None,
        anchor: ir.Node | None = None,
        of_tokens: bool = False,
    ) -> None:
        self._editor, self._edges, self._timestep, self._of_tokens = editor, edges, timestep, of_tokens
        self.anchor = editor.graph[0] if anchor is None else anchor
        self.size: int | str = times if times is not None else "times" if of_tokens else "batch"
        self.taken: tuple[_Array, list[ir.Value]] | None = None

    def with_edges(self, edges: _Array | ir.Value) -> TimeRow:
        """The same time, and its row of another table."""
        times = self.size if isinstance(self.size, int) else None
        return TimeRow(self._editor, edges, self._timestep, times, self.anchor, self._of_tokens)

    @cached_property
    def column(self) -> ir.Value:
        """[T, 1] float32: the times."""
        editor = self._editor
        if self._timestep is None:
            raise TdqError("timestep", None, "the graph has no such input", "Report this")
        time = editor.cast(self.anchor, self._timestep, editor.ir.DataType.FLOAT, "time/float32")
        dimensions = len(self._timestep.shape or ())
        if dimensions > 1 and not self._of_tokens:  # a time for each token or frame, all the same in a sample
            rest = range(1, dimensions)
            starts, ends, axes = (editor.ints(list(values)) for values in ([0 for _ in rest], [1 for _ in rest], rest))
            time = editor.before(self.anchor, "Slice", [time, starts, ends, axes], "time/of_samples")
        if dimensions and self.size == 1 and (self._timestep.shape or (1,))[0] != 1:  # one of times that are the same
            inputs = [time, *(editor.ints([value]) for value in (0, 1, 0))]
            time = editor.before(self.anchor, "Slice", inputs, "time/first")
        column: ir.Value = editor.before(
            self.anchor, "Reshape", [time, editor.ints([-1, 1])], "time/column", shape=[self.size, 1]
        )
        return column

    @cached_property
    def count(self) -> ir.Value:
        """[T] float32: the row, as a number of edges strictly below the time."""
        editor, anchor, types = self._editor, self.anchor, self._editor.ir.DataType
        edge = self._edges
        if isinstance(edge, np.ndarray):
            # a table of one row has no edges, and operators on nothing are not for every backend
            edges = edge if edge.size else np.array([np.inf], dtype=np.float32)
            edge = editor.constant("time/edges", edges[None])
        below = editor.before(anchor, "Greater", [self.column, edge], "time/below", dtype=types.BOOL)
        # counted in float: every backend reduces floats, not every one reduces integers
        below = editor.cast(anchor, below, types.FLOAT, "time/below_float")
        count: ir.Value = editor.before(
            anchor, "ReduceSum", [below, editor.ints([1])], "time/count", shape=[self.size], keepdims=0
        )
        return count

    @cached_property
    def row(self) -> ir.Value:
        """[T] int64."""
        return self._editor.cast(self.anchor, self.count, self._editor.ir.DataType.INT64, "time/row")


class ColumnSource(Protocol):
    """A way to take the row of the time from the columns of a table."""

    def __call__(self, editor: GraphEditor, time: TimeRow, columns: Mapping[str, _Array]) -> dict[str, ir.Value]:
        """[K] columns by name ("<quantizer>/<quantity>") -> [T, 1, 1, 1] values by the same names."""


def gathered(editor: GraphEditor, time: TimeRow, columns: Mapping[str, _Array]) -> dict[str, ir.Value]:
    """Columns of one constant table [K, M, 1, 1], of which one Gather takes the row."""
    # Quantizers of the same tensor often have equal columns (to_q, to_k, to_v): one value for all of them lets
    # a backend see that they compute the same codes, and compute them once.
    distinct = {column.tobytes(): column for column in columns.values()}
    packed = np.stack(list(distinct.values()), axis=1)[:, :, None, None]
    table = editor.constant("time/table", np.ascontiguousarray(packed))
    shape = [time.size, len(distinct), 1, 1]
    row = editor.before(time.anchor, "Gather", [table, time.row], "time/table_row", shape=shape, axis=0)
    parts = split_columns(editor, time, row, len(distinct))
    time.taken = np.ascontiguousarray(packed), parts
    value_of = dict(zip(distinct, parts, strict=True))
    return {name: value_of[column.tobytes()] for name, column in columns.items()}


def split_columns(editor: GraphEditor, time: TimeRow, row: ir.Value, count: int) -> list[ir.Value]:
    """[T, M, 1, 1] -> M values [T, 1, 1, 1]."""
    if count == 1:
        return [row]
    sizes, shape = editor.ints([1] * count), [time.size, 1, 1, 1]
    parts: list[ir.Value] = editor.before(
        time.anchor, "Split", [row, sizes], "time/column_value", outputs=count, shape=shape, axis=1
    )
    return parts


class Lookup:
    """Scales, ratios and offsets of all activation quantizers, as values of the graph.

    Quantities that do not depend on time are constants. The others are columns of one packed table, of which
    ``source`` takes the row of each time (the number of edges strictly below float32(t)) as tensors [T, 1, 1, 1];
    T is 1, or the batch where every sample has its own time.

    Args:
        editor: Of the graph; the lookup is inserted before its first node.
        spec: The quantizers.
        timestep: Graph input that holds the time, or None if nothing depends on it.
        times: Number of times per call; None if that is the dynamic batch, or a multiple of it.
        tokens: N, where the tokens or frames of a sample have times [B, N] of their own.
        ratios: Whether a scale that turns codes back, and depends on time, is wanted as ``s' / s_ref``.
        source: What takes the row of the time from the columns that depend on it.

    Attributes:
        time: The time and its row of the tables that are constants, for others that look something up.

    The quantities are "scale" and "offset" (of those that have one); "dequant_scale" and "dequant_offset", whether
    they differ from those or not; and "ratio" instead of a "dequant_scale" that depends on time, with ``ratios``.
    Scale and offset of an activation whose channels are divided are those of each channel, the product with its divisor
    (:meth:`modelopt_tdq.core.scales.Scales.over_channels`).
    """

    def __init__(
        self,
        editor: GraphEditor,
        spec: QuantizationSpec,
        timestep: ir.Value | None,
        times: int | None,
        *,
        ratios: bool,
        source: ColumnSource,
        tokens: int = 1,
    ) -> None:
        self._editor = editor
        self.time = TimeRow(editor, spec.edges, timestep, times, of_tokens=tokens > 1)
        self._shaped: dict[tuple[ir.Value, int, Layout], ir.Value] = {}
        self.tokens = tokens
        self._divisors = {name: a.divisor for name, a in spec.activations.items() if a.divisor is not None}
        self._of_channels: dict[tuple[ir.Value | float, bytes, int], ir.Value] = {}
        self._shifted: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self.per_sample = times != 1
        columns: dict[str, _Array] = {}
        for name, activation in spec.activations.items():
            columns[f"{name}/scale"] = activation.scale
            if ratios and activation.value_scale.size > 1:
                columns[f"{name}/ratio"] = activation.value_scale / reference_scale(activation)
            else:
                columns[f"{name}/dequant_scale"] = activation.value_scale
            if activation.offset is not None:
                columns[f"{name}/offset"] = activation.offset
            if activation.value_offset is not None:
                columns[f"{name}/dequant_offset"] = activation.value_offset
        self._constant = {name: column for name, column in columns.items() if column.size == 1}
        temporal = {name: column for name, column in columns.items() if column.size > 1}
        self._temporal: dict[str, ir.Value] = {}
        if temporal and timestep is not None:
            self._temporal = source(editor, self.time, temporal)

    def replace(self, renewed: Mapping[ir.Value, ir.Value]) -> None:
        """Other values that hold the same columns."""
        for old, new in renewed.items():
            self._editor.replace(old, new)
        self._temporal = {name: renewed.get(value, value) for name, value in self._temporal.items()}

    def is_temporal(self, quantizer: str, *quantities: str) -> bool:
        """Whether one of these quantities depends on time."""
        return any(f"{quantizer}/{quantity}" in self._temporal for quantity in quantities)

    def constant(self, quantizer: str, quantity: str) -> np.float32:
        """The value of a quantity that does not depend on time."""
        return np.float32(self._constant[f"{quantizer}/{quantity}"][0])

    def value(self, quantizer: str, quantity: str, rank: int, layout: Layout = _ONE_ROW) -> ir.Value:
        """A quantity that broadcasts against an activation of ``rank`` dimensions.

        Args:
            quantizer: Its name.
            quantity: One of those above.
            rank: Of the activation.
            layout: Where the times are in the activation; ``repeats`` of its rows belong to one sample: video models
                fold frames, some attentions fold heads, into the batch.
        """
        divisor = self._divisors.get(quantizer) if quantity in ("scale", "offset") else None
        if divisor is not None:
            return self._channels(quantizer, quantity, rank, layout, divisor)
        return self._value(quantizer, quantity, rank, layout)

    def shifted(self, quantizer: str, quantity: str, rank: int, layout: Layout, shift: ir.Value) -> ir.Value:
        """The offset of each channel: of a quantizer's own, and its shift.

        Args:
            quantizer: Its name.
            quantity: "offset" or "dequant_offset".
            rank: As for :meth:`value`.
            layout: Likewise.
            shift: At the time, to broadcast against the activation.
        """
        name, found = f"{quantizer}/{quantity}", shift
        if name in self._constant or name in self._temporal:
            key = self._value(quantizer, quantity, rank, layout), shift
            if key not in self._shifted:
                self._shifted[key] = self._editor.before(self.time.anchor, "Add", list(key), f"{name}_shifted")
            found = self._shifted[key]
        divisor = self._divisors.get(quantizer) if quantity == "offset" else None
        return found if divisor is None else self._multiplied(found, divisor, rank, quantizer, quantity)

    def _channels(self, quantizer: str, quantity: str, rank: int, layout: Layout, divisor: _Array) -> ir.Value:
        """A quantity times the divisor of the channels, a float32 product."""
        name = f"{quantizer}/{quantity}"
        if name in self._constant:
            number = np.float32(self._constant[name][0])
            key = (float(number), divisor.tobytes(), rank)
            if key not in self._of_channels:
                product = number * _of_rank(divisor, rank)
                self._of_channels[key] = self._editor.constant(f"{name}_of_channels", product)
            return self._of_channels[key]
        value, shape = self._value(quantizer, quantity, rank, layout), None
        if not layout.axis:
            factors = _of_rank(divisor, rank)
            shape = [self.time.size, *factors.shape[1:]] if rank > divisor.ndim else list(factors.shape)
        return self._multiplied(value, divisor, rank, quantizer, quantity, shape)

    def _multiplied(
        self, value: ir.Value, divisor: _Array, rank: int, quantizer: str, quantity: str, shape: Any = None
    ) -> ir.Value:
        """A value of the graph times the divisor of the channels; one node for all that are the same."""
        key = (value, divisor.tobytes(), rank)
        if key not in self._of_channels:
            inputs = [value, self._editor.constant(f"{quantizer}/divisor", _of_rank(divisor, rank))]
            name = f"{quantizer}/{quantity}_of_channels"
            self._of_channels[key] = self._editor.before(self.time.anchor, "Mul", inputs, name, shape=shape)
        return self._of_channels[key]

    def _value(self, quantizer: str, quantity: str, rank: int, layout: Layout) -> ir.Value:
        name = f"{quantizer}/{quantity}"
        if name in self._constant:
            return self._editor.constant(name, self._constant[name].reshape(()))
        value = self._temporal[name]
        layout = layout if self.per_sample else _ONE_ROW
        if rank == 4 and layout == _ONE_ROW:
            return value
        # Of the rank of what it scales: OpenVINO fuses no value of another rank into its kernels.
        key = (value, rank, layout)
        if key not in self._shaped:
            editor, anchor = self._editor, self.time.anchor
            if layout.repeats > 1:
                value = editor.before(anchor, "Reshape", [value, editor.ints([-1, 1])], f"{name}/column")
                value = editor.before(anchor, "Expand", [value, editor.ints([1, layout.repeats])], f"{name}/folded")
            shape = editor.ints(self.placed(rank, layout)) if rank else editor.ints([])
            self._shaped[key] = editor.before(anchor, "Reshape", [value, shape], f"{name}/rank{rank}")
        return self._shaped[key]

    def placed(self, rank: int, layout: Layout) -> list[int]:
        """Shape of one number per row, or per token, of an activation of ``rank`` dimensions."""
        shape = [-1] + [1] * (rank - 1)
        if layout.axis:
            shape[layout.axis] = self.tokens * layout.repeats
        return shape


def _of_rank(divisor: _Array, rank: int) -> _Array:
    """As it broadcasts against ``rank`` dimensions; not beyond its own."""
    return divisor.reshape((1,) * (rank - divisor.ndim) + divisor.shape)
