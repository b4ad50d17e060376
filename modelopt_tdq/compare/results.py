"""What a comparison found: per step, and per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_tdq.compare.metrics import CodesDifference, OutputDifference

__all__ = ["LayerResult", "ModelComparison", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """One backend at one time step.

    Attributes:
        backend: Its name.
        step: Which call it was, from 0.
        time: Of the step, in the model's own units; the smallest where every sample has its own.
        difference: Of the model's first output.
    """

    backend: str
    step: int
    time: float
    difference: OutputDifference


@dataclass(frozen=True)
class LayerResult:
    """One layer of one backend at one time step, given the reference's codes.

    Attributes:
        backend: Its name.
        step: Which call it was, from 0.
        time: Of the step, in the model's own units.
        name: Of the quantizer; or of the output, behind the last of them.
        difference: Of the codes of the layer's input; or of the output.
    """

    backend: str
    step: int
    time: float
    name: str
    difference: CodesDifference | OutputDifference


@dataclass(frozen=True)
class ModelComparison:
    """What :func:`~modelopt_tdq.compare.compare_model` found.

    Attributes:
        steps: The output, per backend and step.
        layers: The layers whose codes differ, be it by rounding only, in the order in which they run; last the
            output, if it differs by more than rounding.
        compared_codes: Codes compared per backend, over all steps and layers.
        quantizers: Names of those whose codes were compared, in the order in which they run.
        notes: What the reader has to know about how it was compared.
    """

    steps: tuple[StepResult, ...]
    layers: tuple[LayerResult, ...]
    compared_codes: Mapping[str, int]
    quantizers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no output differs by more than the quantization noise, and no layer by more than rounding."""
        return all(step.difference for step in self.steps) and not self.faults

    @property
    def faults(self) -> tuple[LayerResult, ...]:
        """The layers that rounding does not explain: first those of the first step, in the order they run."""
        return tuple(layer for layer in self.layers if not layer.difference)

    def codes(self, backend: str) -> list[CodesDifference]:
        """The differences in codes of one backend."""
        found = [layer.difference for layer in self.layers if layer.backend == backend]
        return [difference for difference in found if isinstance(difference, CodesDifference)]
