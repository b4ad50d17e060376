"""What a lowering works on, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import Lookup
from modelopt_tdq.export.markers import ACTIVATION_MARKER, DOMAIN
from modelopt_tdq.export.one_time import rows_of_a_sample
from modelopt_tdq.export.spec import ActivationSpec, QuantizationSpec
from modelopt_tdq.export.weights import LoweredWeight, marker_name
from modelopt_tdq.model.token_times import Layout, Reader, cannot_be_matched, find_layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LoweringContext", "TokenTimes"]


@dataclass(frozen=True)
class TokenTimes:
    """Times of tokens or frames in the sample run, different ones in a sample.

    Attributes:
        shape: [B, N], theirs.
        readers: See :func:`modelopt_tdq.model.token_times.readers`.
        per_frame: See :func:`modelopt_tdq.model.token_times.tokens_of_a_frame`.
    """

    shape: tuple[int, int]
    readers: Mapping[str, Reader]
    per_frame: frozenset[int]


@dataclass
class LoweringContext:
    """A marker graph whose weights are lowered already.

    Attributes:
        editor: Of the graph.
        spec: The quantizers.
        lookup: Their scales.
        weights: The quantized weight behind a value.
        shapes: Those that each marker saw in the sample run, by quantizer name.
        samples: Times per call in the sample run.
        batch: Samples per call in the sample run.
        table_input: Whether the scales are an input of the graph.
        features: Names of the layers whose output is looked up.
        token_times: Where tokens or frames have times of their own.
        limited: Quantizers in low precision whose product has a low-precision kernel on some backends only, with which.
    """

    editor: GraphEditor
    spec: QuantizationSpec
    lookup: Lookup
    weights: dict[ir.Value, LoweredWeight]
    shapes: dict[str, list[tuple[int, ...]]]
    samples: int
    batch: int = 1
    table_input: bool = False
    token_times: TokenTimes | None = None
    features: list[str] = field(default_factory=list)
    low_precision: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    limited: dict[str, str] = field(default_factory=dict)

    def markers(self) -> list[ir.Node]:
        """The activation markers, in graph order."""
        return [n for n in self.editor.graph if n.domain == DOMAIN and n.op_type == ACTIVATION_MARKER]

    def activation(self, marker: ir.Node) -> ActivationSpec:
        """The quantizer of a marker."""
        return self.spec.activations[marker_name(marker)]

    def layout(self, marker: ir.Node) -> Layout:
        """Where the times are in the marker's activation: how many of its rows have one, or which dimension.

        Raises:
            TdqError: Times are per sample, and the activation's rows are no multiple of the samples; or they are those
                of tokens or frames, and the activation does not tell which has which.
        """
        name = marker_name(marker)
        temporal = self.lookup.is_temporal(name, "scale", "offset", "dequant_scale", "ratio", "dequant_offset")
        temporal |= self.spec.activations[name].is_shifted_over_time
        return self._layout(name) if temporal else Layout(0)

    def layout_of_correction(self, marker: ir.Node) -> Layout:
        """Likewise, of the output that a marker corrects."""
        name = marker_name(marker)
        return self._layout(name) if self.spec.corrections[name].is_temporal else Layout(0)

    def _layout(self, name: str) -> Layout:
        shapes = self.shapes.get(name, [])
        if not self.lookup.per_sample:
            return Layout(0)
        if self.token_times is not None:
            return self._layout_of_tokens(name, shapes, self.token_times)
        rows = rows_of_a_sample(shapes, self.samples)
        if rows is None:
            raise TdqError(
                "sample_inputs",
                name,
                f"{self.samples} times cannot be matched with activations of shape {shapes}",
                "Pass one time for the whole batch, or leave this quantizer out with a quant_cfg rule",
            )
        return Layout(0, rows)

    @staticmethod
    def _layout_of_tokens(name: str, shapes: list[tuple[int, ...]], times: TokenTimes) -> Layout:
        reader = times.readers.get(name)
        layouts = [find_layout(times.shape, shape, reader, times.per_frame) for shape in shapes]
        for shape, layout in zip(shapes, layouts, strict=True):
            if layout is None or layout != layouts[0]:
                raise cannot_be_matched(name, times.shape, shape, reader)
        return layouts[0] or Layout(0)

    def quantized(self, name: str) -> None:
        """Report a quantizer as deployed in low precision."""
        if name not in self.low_precision and name not in self.skipped:
            self.low_precision.append(name)

    def skip(self, name: str, reason: str) -> None:
        """Report a quantizer as not deployed in low precision."""
        self.skipped.setdefault(name, reason)
        if name in self.low_precision:
            self.low_precision.remove(name)
