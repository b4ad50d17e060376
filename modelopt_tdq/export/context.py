"""What a lowering works on, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import Lookup
from modelopt_tdq.export.markers import ACTIVATION_MARKER, DOMAIN
from modelopt_tdq.export.one_time import rows_of_a_sample
from modelopt_tdq.export.spec import ActivationSpec, QuantizationSpec
from modelopt_tdq.export.weights import LoweredWeight, marker_name

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LoweringContext"]


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

    def fold(self, marker: ir.Node) -> int:
        """Rows of the marker's activation per sample.

        Raises:
            TdqError: Times are per sample, and the activation's rows are no multiple of the samples.
        """
        name = marker_name(marker)
        temporal = self.lookup.is_temporal(name, "scale", "offset", "dequant_scale", "ratio", "dequant_offset")
        return self._fold(name) if temporal else 1

    def fold_of_correction(self, marker: ir.Node) -> int:
        """Rows per sample of the output that a marker corrects; errors as of :meth:`fold`."""
        name = marker_name(marker)
        return self._fold(name) if self.spec.corrections[name].is_temporal else 1

    def _fold(self, name: str) -> int:
        shapes = self.shapes.get(name, [])
        if not self.lookup.per_sample:
            return 1
        rows = rows_of_a_sample(shapes, self.samples)
        if rows is None:
            raise TdqError(
                "sample_inputs",
                name,
                f"{self.samples} times cannot be matched with activations of shape {shapes}",
                "Pass one time for the whole batch, or leave this quantizer out with a quant_cfg rule",
            )
        return rows

    def quantized(self, name: str) -> None:
        """Report a quantizer as deployed in low precision."""
        if name not in self.low_precision and name not in self.skipped:
            self.low_precision.append(name)

    def skip(self, name: str, reason: str) -> None:
        """Report a quantizer as not deployed in low precision."""
        self.skipped.setdefault(name, reason)
        if name in self.low_precision:
            self.low_precision.remove(name)
