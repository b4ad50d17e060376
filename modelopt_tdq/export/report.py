"""What an export did: which quantizers are deployed in low precision, and what became of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.weights import weights_form

__all__ = ["UNUSED", "ExportReport", "report_of"]

#: Why the quantizers of a layer are not in the graph.
UNUSED = "the model does not run this layer on these sample inputs"


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        path: The ONNX file. Weights of more than 1 GiB lie beside it, in ``<name>.data``.
        lowering: "ratio", "reference" or "plugin".
        quantized: Names of the quantizers that are deployed in low precision.
        skipped: The other enabled quantizers, each with the reason: their numbers are those of the torch
            model, but the operator computes in floating point.
        features: Names of the layers whose output is looked up by time, and that are gone from the graph (but stay,
            for other times, with the policy "exact").
        features_form: The form that they have: "table of outputs", with its size; "" if there are none.
        weights_form: Size of the quantized weights, and what is lost where codes of at most 4 bits take 8; "" if there
            are none.
        unquantized: Names of the layers that the config meant to quantize and that compute in floating point, each with
            the reason: those that the warning of ``mtq.quantize`` named, and layers that were added since, such as the
            matrices of a LoRA.
        limited: Those of ``quantized`` whose layer has a low-precision kernel on some backends only, each with which,
            and how to leave it out.
        constants: Names of the tensors among the sample inputs whose values are part of the graph.
        decisions: Lines of the model's code that decide by the values of other inputs what runs. The graph has what the
            sample inputs decide, and gives NaN for inputs that decide otherwise.
    """

    path: Path
    lowering: str
    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    features: tuple[str, ...] = ()
    features_form: str = ""
    weights_form: str = ""
    limited: tuple[tuple[str, str], ...] = ()
    unquantized: tuple[tuple[str, str], ...] = ()
    constants: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was written, and, a line each, what is not in low precision and why."""
        lines = [f"{self.path}: {len(self.quantized)} quantizers in low precision, {len(self.skipped)} skipped"]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped]
        lines += [f"  not quantized {name}: {reason}" for name, reason in self.unquantized]
        if self.constants:
            lines.append(f"part of the graph, and no inputs: {', '.join(self.constants)}")
        lines += [f"NaN for inputs that decide otherwise: {line}" for line in self.decisions]
        if self.weights_form:
            lines.append(f"weights: {self.weights_form}")
        return "\n".join(lines)


def report_of(
    context: LoweringContext,
    path: Path,
    lowering: str,
    unquantized: Mapping[str, str] | None = None,
    constants: tuple[str, ...] = (),
    decisions: tuple[str, ...] = (),
) -> ExportReport:
    """What became of the quantizers of a lowered graph that is written to ``path``."""
    spec = context.spec
    stored = {weight.spec.name for weight in context.weights.values()}
    quantized, skipped = [], []
    for name in [*spec.activations, *spec.weights, *spec.folded]:
        if name in context.skipped:
            skipped.append((name, context.skipped[name]))
        elif name in context.low_precision or name in stored:
            quantized.append(name)
        elif name in spec.folded:
            skipped.append((name, f"the weight has {spec.folded[name][1]}; its values are stored as floats"))
        else:
            skipped.append((name, UNUSED))
    # a weight has one entry per value of the graph that carries it, before and after a cast
    stored_once = {id(weight): weight for weight in context.weights.values()}.values()
    return ExportReport(
        path,
        lowering,
        tuple(quantized),
        tuple(skipped),
        tuple(context.features),
        _features_form(context),
        weights_form(stored_once),
        tuple((name, which) for name, which in context.limited.items() if name not in context.skipped),
        tuple((unquantized or {}).items()),
        constants,
        decisions,
    )


def _features_form(context: LoweringContext) -> str:
    table = context.spec.features
    if table is None or not context.features:
        return ""
    size = sum(table.features[name].nbytes for name in context.features)
    return f"table of outputs, {len(table)} times, {size:,} bytes, times between the rows: {table.outside}"
