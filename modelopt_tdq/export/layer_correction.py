"""Corrections of layers' outputs, y <- gain(t) * y + bias(t), which a marker behind each layer stands for.

What does not depend on time becomes part of the scales of the weights and of the layer's bias (:func:`fold_static`), in
every lowering. What does takes, in the graphs of "ratio" and "plugin", the place of what stands behind a product of
codes anyway (:mod:`modelopt_tdq.export.rescale`), a row of channels each:

    factor = gain * s' / s_ref,    addend = gain * (bias of the layer + o' * sum(w)) + bias        [K, C] float32

Elsewhere it is a Mul and an Add in place. Rows are those of
:class:`~modelopt_tdq.export.channel_rows.ChannelRows`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.export.channel_rows import ChannelRows
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.markers import CORRECTION_MARKER, DOMAIN, WEIGHT_MARKER
from modelopt_tdq.export.product import PRODUCTS, bias_of, computes_bias
from modelopt_tdq.export.spec import CorrectionSpec, QuantizationSpec, WeightSpec
from modelopt_tdq.export.weights import marker_name
from modelopt_tdq.model.kinds import kind_of_operator

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["add_in_place", "correction_behind", "corrections", "fold_static", "lower_correction"]

_Array = np.ndarray[Any, np.dtype[np.float32]]


def corrections(graph: ir.Graph) -> list[ir.Node]:
    """The markers of corrections, in graph order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == CORRECTION_MARKER]


def correction_behind(product: ir.Node) -> ir.Node | None:
    """The correction that takes the product's output, its bias added, and nothing else does; None if there is none."""
    if computes_bias(product):
        return None
    _, biased = bias_of(product)
    uses = [node for node, _ in biased.uses()]
    alone = len(uses) == 1 and not biased.is_graph_output()
    return uses[0] if alone and uses[0].domain == DOMAIN and uses[0].op_type == CORRECTION_MARKER else None


@dataclass(frozen=True)
class _Static:
    """A correction that does not depend on time, and what it can become a part of."""

    marker: ir.Node
    product: ir.Node
    weight: str
    axis: int


def fold_static(editor: GraphEditor, spec: QuantizationSpec) -> QuantizationSpec:
    """Make corrections that do not depend on time part of weights and biases, where these are constants.

    To be called while the weights are markers.

    Returns:
        ``spec`` with the scales that the weights have then.
    """
    behind = {id(marker): p for p in editor.graph if p.op_type in PRODUCTS if (marker := correction_behind(p))}
    found: dict[str, list[_Static | None]] = defaultdict(list)
    for marker in corrections(editor.graph):
        correction = spec.corrections[marker_name(marker)]
        if not correction.is_temporal:
            product = behind.get(id(marker))
            found[correction.layer].append(None if product is None else _static(marker, product, spec))
    weights = dict(spec.weights)
    for layer, places in found.items():
        known = [place for place in places if place is not None]
        if len(known) < len(places):  # in all calls of a layer, or in none
            continue
        correction = spec.corrections[f"{layer}.output_quantizer"]
        weights[known[0].weight] = _scaled(weights[known[0].weight], correction.gain[0], known[0].axis)
        for place in known:
            _fold_bias(editor, place, correction)
    return replace(spec, weights=weights)


def _static(marker: ir.Node, product: ir.Node, spec: QuantizationSpec) -> _Static | None:
    correction = spec.corrections[marker_name(marker)]
    node = None if product.inputs[1] is None else product.inputs[1].producer()
    while node is not None and node.op_type in ("Transpose", "Cast", "Identity") and len(_users(node)) == 1:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != WEIGHT_MARKER or marker_name(node) != f"{correction.layer}.weight_quantizer":
        return None
    weight = spec.weights.get(marker_name(node))
    kind = kind_of_operator(product.op_type)
    axis = 0 if kind is None else kind.weight_axis
    if weight is None or weight.axis not in (None, axis) or weight.shape[axis] != correction.gain.shape[1]:
        return None
    return _Static(marker, product, weight.name, axis)


def _users(node: ir.Node) -> list[ir.Node]:
    return [user for user, _ in node.outputs[0].uses()]


def _scaled(weight: WeightSpec, gain: _Array, axis: int) -> WeightSpec:
    return replace(weight, scale=(weight.scale * gain).astype(np.float32), axis=axis)


def _fold_bias(editor: GraphEditor, place: _Static, correction: CorrectionSpec) -> None:
    product, marker = place.product, place.marker
    bias, biased = bias_of(product)
    gain, shift = (rows[0].astype(np.float64) for rows in (correction.gain, correction.bias))
    dtype = product.outputs[0].dtype
    folded = (shift if bias is None else gain * bias + shift).astype(np.float32 if dtype is None else dtype.numpy())
    shape = product.outputs[0].shape
    value = editor.constant(f"{correction.layer}/corrected_bias", folded)
    if product.op_type == "MatMul":
        new = editor.before(marker, "Add", [product.outputs[0], value], f"{correction.layer}/biased", dtype=dtype)
        new.shape = shape
    else:
        attributes: dict[str, Any] = {k: v for k, v in product.attributes.items() if k != "beta"}
        inputs = [*product.inputs[:2], value]
        name = f"{correction.layer}/product"
        new = editor.before(product, product.op_type, inputs, name, dtype=dtype, shape=shape, **attributes)
    editor.replace(marker.outputs[0], new)
    # nothing uses the old product, its Add and the marker any more
    for node in (marker, biased.producer(), product):
        if node is not None and node.graph is not None and not any(out.uses() for out in node.outputs):
            editor.graph.remove(node, safe=True)


def _rank(marker: ir.Node) -> int:
    """Dimensions of the corrected output."""
    return len(marker.outputs[0].shape or ())


def add_in_place(rows: ChannelRows, marker: ir.Node, spec: CorrectionSpec) -> None:
    """The rows that :func:`lower_correction` wants."""
    for what, values in (("gain", spec.gain), ("bias", spec.bias)):
        rows.add(marker, what, values, _rank(marker), spec.trailing)


def lower_correction(context: LoweringContext, rows: ChannelRows, marker: ir.Node) -> None:
    """Replace the marker by a Mul and an Add in float32."""
    editor, layer = context.editor, context.spec.corrections[marker_name(marker)].layer
    value, layout = cast("ir.Value", marker.inputs[0]), context.layout_of_correction(marker)
    shape, dtype = marker.outputs[0].shape, marker.outputs[0].dtype
    y = editor.cast(marker, value, editor.ir.DataType.FLOAT, f"{layer}/float32")
    for op_type, what in (("Mul", "gain"), ("Add", "bias")):
        y = editor.before(marker, op_type, [y, rows.value(marker, what, layout)], f"{layer}/{what}", shape=shape)
    if dtype is not None:
        y = editor.cast(marker, y, dtype, f"{layer}/corrected")
    editor.replace(marker.outputs[0], y)
