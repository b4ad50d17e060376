"""Where did my precision go: the type that the kernel of every quantized layer really reads.

TensorRT falls back to float kernels without a word. What counts is the kernel that multiplies: it has to read codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.kinds import title, without_kernel
from modelopt_tdq.runtime.build.layers import LOW_PRECISION_TYPES, EngineLayer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modelopt_tdq.runtime.build.report import EngineReport

__all__ = [
    "FLOAT",
    "UNKNOWN",
    "FloatLayersError",
    "LayerPrecision",
    "float_layers",
    "layer_precisions",
    "render_precision",
    "require_low_precision",
]

#: The type of a layer that multiplies floats; and of one whose kernel cannot be told.
FLOAT, UNKNOWN = "float", "unknown"


@dataclass(frozen=True)
class LayerPrecision:
    """How one quantized layer runs.

    Attributes:
        name: The ONNX node, a convolution or product with two quantized operands.
        operator: Its ONNX operator.
        type: ``INT8``, ``FP8``, ``INT4``, ``FP4``; ``float``; ``unknown`` where no kernel carries its name, or where
            a kernel that several quantized layers share reads both codes and floats.
        kernel: TensorRT's name of the kernel that multiplies; empty if no kernel carries the layer's name.
        reads: The types of all tensors that this kernel reads, constants excluded.
    """

    name: str
    operator: str
    type: str
    kernel: str
    reads: tuple[str, ...]

    @property
    def low_precision(self) -> bool:
        """Whether the layer multiplies codes."""
        return self.type not in (FLOAT, UNKNOWN)

    @property
    def in_float(self) -> bool:
        """Whether its kernel reads floats."""
        return self.type == FLOAT


class FloatLayersError(TdqError):
    """Quantized layers run in float. ``report`` describes the engine, which a build that raises this did not write."""

    report: EngineReport | None = None


def layer_precisions(layers: Sequence[EngineLayer], quantized: Mapping[str, str]) -> tuple[LayerPrecision, ...]:
    """The precision of each quantized layer, in the order of ``quantized``.

    Args:
        layers: The entries of the engine.
        quantized: ONNX nodes with quantized operands, name to operator.
    """
    serving: dict[str, list[EngineLayer]] = {name: [] for name in quantized}
    for layer in layers:
        for node in layer.onnx_nodes:
            if node in serving:
                serving[node].append(layer)
    return tuple(_precision(name, operator, serving[name], quantized) for name, operator in quantized.items())


def _precision(
    name: str, operator: str, serving: Sequence[EngineLayer], quantized: Mapping[str, str]
) -> LayerPrecision:
    # elementwise kernels carry the names of the layers whose scaling they do; they count only if nothing else does
    multiplying = [layer for layer in serving if not layer.elementwise] or list(serving)
    if not multiplying:
        return LayerPrecision(name, operator, UNKNOWN, "", ())
    kernel = next((layer for layer in multiplying if layer.low_precision), multiplying[0])
    kind = FLOAT
    if kernel.low_precision:
        several = sum(node in quantized for node in kernel.onnx_nodes) > 1
        mixed = not LOW_PRECISION_TYPES.issuperset(kernel.inputs)
        codes = next(read for read in kernel.inputs if read in LOW_PRECISION_TYPES)
        kind = UNKNOWN if several and mixed else codes.upper()
    return LayerPrecision(name, operator, kind, kernel.name, kernel.inputs)


def float_layers(report: EngineReport, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The quantized layers that run in float all the same: TensorRT falls back without a word.

    Args:
        report: What :func:`~modelopt_tdq.build_engine` returned.
        names: ONNX nodes to check; by default all that have quantized operands, and whose kernel can be told.

    Raises:
        TdqError: No kernel of the engine carries one of ``names``.
    """
    if names is None:
        return tuple(layer.name for layer in report.precisions if layer.in_float)
    return tuple(name for name in names if not report.low_precision(name))


def require_low_precision(report: EngineReport, names: Sequence[str] | None = None) -> None:
    """Fail if a quantized layer runs in float. Arguments as :func:`float_layers`.

    Raises:
        FloatLayersError: Some run in float; the error names them.
        TdqError: No kernel of the engine carries one of ``names``.
    """
    if fallen := float_layers(report, names):
        operators = sorted({report.quantized.get(name, "?") for name in fallen})
        hopeless = [operator for operator in operators if report.backend in without_kernel(operator)]
        leave_out = (
            f"leave {', '.join(hopeless)}, for which {title(report.backend)} has no low-precision kernel, out with a "
            "rule of `quant_cfg`; "
            if hopeless
            else ""
        )
        error = FloatLayersError(
            "layers",
            list(fallen),
            f"{len(fallen)} quantized layers ({', '.join(operators)}) run in float in {report.engine.name}",
            f'Export with lowering="ratio", whose quantize scales are constants; {leave_out}or build '
            "with allow_float=True (--allow-float) to have the engine all the same",
        )
        error.report = report
        raise error


def render_precision(report: EngineReport, *, full: bool | None = None) -> RenderableType:
    """The table of all quantized layers, to be printed by a ``rich.console.Console``.

    Args:
        report: What :func:`~modelopt_tdq.build_engine` returned, or the ``report`` of a :class:`FloatLayersError`.
        full: Every layer; or only the number of layers per type. None: every layer if some is not in low precision.
    """
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    layers = report.precisions
    counts = Counter((layer.type, layer.operator) for layer in layers)
    by_type = Table("type", "layers", "operators", title="Precision", title_justify="left")
    for kind in sorted({layer.type for layer in layers}, key=_order):
        operators = sorted((operator, n) for (found, operator), n in counts.items() if found == kind)
        shown = ", ".join(f"{n} {operator}" for operator, n in operators)
        by_type.add_row(_marked(kind), str(sum(n for _, n in operators)), shown)
    if not (any(not layer.low_precision for layer in layers) if full is None else full):
        return by_type
    table = Table("layer", "operator", "type", "reads", "kernel", title="Layers", title_justify="left")
    for layer in sorted(layers, key=lambda layer: _order(layer.type)):  # stable: in the order of the graph
        reads = ", ".join(dict.fromkeys(layer.reads))
        cells: list[Any] = [escape(layer.name), layer.operator, _marked(layer.type), reads, escape(layer.kernel)]
        table.add_row(*cells)
    for column in (0, 4):
        table.columns[column].overflow = "fold"
    return Group(by_type, table)


def _order(kind: str) -> tuple[bool, str]:
    return kind not in (FLOAT, UNKNOWN), kind


def _marked(kind: str) -> str:
    return {FLOAT: f"[red]{FLOAT}[/]", UNKNOWN: f"[yellow]{UNKNOWN}[/]"}.get(kind, f"[green]{kind}[/]")
