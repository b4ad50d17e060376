"""Graphs whose samples have to have the same time, and that say so: they give NaN where times differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.spec import ActivationSpec, QuantizationSpec
from modelopt_tdq.model.timestep import one_of_all

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["nan_where_times_differ", "needs_one_time", "rows_of_a_sample"]


def rows_of_a_sample(shapes: Sequence[tuple[int, ...]], samples: int) -> int | None:
    """Rows of an activation per sample; None if they cannot be matched with the samples."""
    rows = {shape[0] if shape else 0 for shape in shapes}
    if len(rows) != 1 or 0 in rows or min(rows) % samples:
        return None
    return min(rows) // samples


def _is_temporal(spec: ActivationSpec) -> bool:
    rows = (spec.scale, spec.offset, spec.dequant_scale, spec.dequant_offset)
    return any(row is not None and row.size > 1 for row in rows) or spec.is_shifted_over_time


def needs_one_time(spec: QuantizationSpec, shapes: Mapping[str, Sequence[tuple[int, ...]]], times: Tensor) -> bool:
    """Whether times that are all the same have to stay so, since samples cannot be told apart in some activation.

    As the torch model does: tokens that come first, or that were sent to an expert, take the one time that there is.

    Args:
        spec: The quantizers.
        shapes: Those that each of them saw, by name.
        times: [B] of the sample call.
    """
    if len(times) == 1 or one_of_all(times) is None:
        return False
    temporal = [name for name, activation in spec.activations.items() if _is_temporal(activation)]
    temporal += [name for name, correction in spec.corrections.items() if correction.is_temporal]
    return any(rows_of_a_sample(shapes[name], len(times)) is None for name in temporal if shapes.get(name))


def nan_where_times_differ(editor: GraphEditor, time: ir.Value, *, in_a_sample: bool) -> None:
    """Let the floating outputs of a graph be NaN where the times of a call are not all the same, in place.

    Nodes are not in order afterwards.

    Args:
        editor: Of the graph.
        time: [B], or [B, N, ...].
        in_a_sample: Whether samples may have different ones, and only those of one sample may not.
    """
    types, anchor = editor.ir.DataType, editor.graph[0]
    time = editor.cast(anchor, time, types.FLOAT, "time/all")
    if in_a_sample:  # how far they are from the first
        rest = range(1, len(time.shape or ()))
        starts, ends_, axes = (editor.ints(list(values)) for values in ([0 for _ in rest], [1 for _ in rest], rest))
        first = editor.before(anchor, "Slice", [time, starts, ends_, axes], "time/first_of_sample")
        time = editor.before(anchor, "Sub", [time, first], "time/behind_first")
    ends = [
        editor.before(anchor, operator, [time], f"time/{name}", shape=[], keepdims=0)
        for operator, name in (("ReduceMin", "least"), ("ReduceMax", "greatest"))
    ]
    same = editor.before(anchor, "Equal", ends, "time/same", dtype=types.BOOL, shape=[])
    for index, output in enumerate(list(editor.graph.outputs)):
        if output.dtype is None or not output.dtype.is_floating_point():
            continue
        name = str(output.name)
        output.name = editor.unique(f"{name}/of_one_time")
        nothing = editor.constant("time/nan", np.array(np.nan, dtype=output.dtype.numpy()))
        inputs = [same, output, nothing]
        checked = editor.before(anchor, "Where", inputs, f"{name}/checked", dtype=output.dtype, shape=output.shape)
        editor.graph.outputs[index] = checked
        checked.name = name
