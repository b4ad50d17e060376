"""Rows of channels, of which a graph takes that of the time: corrections of outputs, and shifts of inputs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from modelopt_tdq.core.schedule import edges
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.model.token_times import Layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ChannelRows"]

_Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class _Rows:
    """Rows [K, C] of one kind; equal if all is, but for the name.

    Attributes:
        content: Their bytes.
        count: K.
        rank: Dimensions of the tensor that they go with.
        trailing: Those behind that of the channels.
        what: Of which the nodes are named.
    """

    content: bytes
    count: int
    rank: int
    trailing: int
    what: str = field(compare=False)

    @property
    def width(self) -> int:
        """C."""
        return len(self.content) // (4 * self.count)

    def placed(self, rank: int, trailing: int) -> _Array:
        """[K, 1, ..., C, 1, ...] of ``rank`` dimensions."""
        rows = np.frombuffer(self.content, dtype=np.float32)
        return rows.reshape(self.count, *(1,) * (rank - 2 - trailing), -1, *(1,) * trailing)


class ChannelRows:
    """Rows [K, C] of channels, of which the graph takes that of the time: all are added, then emitted together.

    Args:
        context: Of the lowering.
        times: [K] float32, of the rows; None if each is the only one of its kind.

    Attributes:
        times: As above.
        same_times: Whether these are the times of the scales.
    """

    def __init__(self, context: LoweringContext, times: _Array | None) -> None:
        self._context, self.times = context, times
        self._added: dict[tuple[Any, str], _Rows] = {}
        self._values: dict[_Rows, ir.Value] = {}
        self._laid_out: dict[tuple[_Rows, Layout], ir.Value] = {}
        self.same_times = times is not None and np.array_equal(times, context.spec.timesteps)
        self._time = context.lookup.time
        if times is not None and not self.same_times:
            self._time = self._time.with_edges(edges(torch.from_numpy(times)).numpy())

    def add(self, owner: Any, what: str, rows: _Array, rank: int, trailing: int) -> None:
        """Rows for a tensor of ``rank`` dimensions, with ``trailing`` ones behind that of the channels."""
        values = rows.astype(np.float32)
        self._added[owner, what] = _Rows(values.tobytes(), len(values), rank, trailing, what)

    def emit(self) -> None:
        """Look up the row of the time: one Gather, laid out as most of the channels want it.

        Equal rows are one value: a backend sees that q, k and v are quantized alike, and computes their codes once.
        """
        editor, anchor = self._context.editor, self._time.anchor
        widths: dict[tuple[int, int], int] = defaultdict(int)
        temporal = []
        for rows in dict.fromkeys(self._added.values()):
            if rows.count == 1:
                constant = rows.placed(rows.rank, rows.trailing)[0]
                self._values[rows] = editor.constant(f"channels/{rows.what}", constant)
            else:
                widths[rows.rank, rows.trailing] += rows.width
                temporal.append(rows)
        if not temporal:
            return
        layout = max(widths, key=lambda kind: widths[kind])
        axis = layout[0] - 1 - layout[1]
        parts = [rows.placed(*layout) for rows in temporal]
        # beside the scales, where they are laid out so: one Gather, one kernel
        scales = self._time.taken if layout == (4, 2) else None
        others = [] if scales is None else [scales[0]]
        packed = np.ascontiguousarray(np.concatenate([*others, *parts], axis))
        table, shape = editor.constant("channels/table", packed), [self._time.size, *packed.shape[1:]]
        row = editor.before(anchor, "Gather", [table, self._time.row], "channels/row", shape=shape, axis=0)
        widths_of = [1] * (0 if scales is None else len(scales[1])) + [part.shape[axis] for part in parts]
        values = [row]
        if len(widths_of) > 1:
            sizes = editor.ints(widths_of)
            values = editor.before(anchor, "Split", [row, sizes], "channels/part", outputs=len(widths_of), axis=axis)
        if scales is not None:
            shared, values = values[: len(scales[1])], values[len(scales[1]) :]
            for value in shared:
                value.shape = editor.ir.Shape([self._time.size, 1, 1, 1])
            self._context.lookup.replace(dict(zip(scales[1], shared, strict=True)))
        for rows, part, value in zip(temporal, parts, values, strict=True):
            value.shape = editor.ir.Shape([self._time.size, *part.shape[1:]])
            self._values[rows] = value
            if (rows.rank, rows.trailing) != layout:
                placed = [self._time.size, *rows.placed(rows.rank, rows.trailing).shape[1:]]
                inputs = [value, editor.ints([-1, *placed[1:]])]
                self._values[rows] = editor.before(anchor, "Reshape", inputs, f"channels/{rows.what}", shape=placed)

    def has(self, owner: Any, what: str) -> bool:
        """Whether there are such rows."""
        return (owner, what) in self._added

    def value(self, owner: Any, what: str, layout: Layout) -> ir.Value:
        """The row of each time, to broadcast; ``layout`` says where the times are in the tensor."""
        rows = self._added[owner, what]
        if layout == Layout(0) or rows.count == 1 or not self._context.lookup.per_sample:
            return self._values[rows]
        key = rows, layout
        if key not in self._laid_out:
            self._laid_out[key] = self._of_layout(rows, layout)
        return self._laid_out[key]

    def _of_layout(self, rows: _Rows, layout: Layout) -> ir.Value:
        editor, anchor, what = self._context.editor, self._time.anchor, rows.what
        value, channels, channel = self._values[rows], rows.width, rows.rank - 1 - rows.trailing
        if layout.repeats > 1:
            flat = editor.before(anchor, "Reshape", [value, editor.ints([-1, 1, channels])], f"channels/{what}_rows")
            repeats = editor.ints([1, layout.repeats, 1])
            value = editor.before(anchor, "Expand", [flat, repeats], f"channels/{what}_folded")
        shape = self._context.lookup.placed(rows.rank, layout)
        shape[channel] = channels
        if channel < layout.axis:  # channels in front of the tokens
            tokens = editor.ints([-1, shape[layout.axis], channels])
            value = editor.before(anchor, "Reshape", [value, tokens], f"channels/{what}_tokens")
            value = editor.before(anchor, "Transpose", [value], f"channels/{what}_channels", perm=[0, 2, 1])
        return cast("ir.Value", editor.before(anchor, "Reshape", [value, editor.ints(shape)], f"channels/{what}"))
