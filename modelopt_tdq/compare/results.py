"""What a comparison found: per step, and per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelopt_tdq.compare.metrics import CodesDifference, OutputDifference
from modelopt_tdq.errors import TdqError

__all__ = ["LayerResult", "ModelComparison", "PartFailure", "StepResult"]


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
class PartFailure:
    """A part of a comparison that could not be done.

    Attributes:
        backend: Its name.
        part: What was not compared.
        error: Why.
    """

    backend: str
    part: Literal["outputs", "layers"]
    error: Exception

    def __str__(self) -> str:
        kind = "" if isinstance(self.error, TdqError) else f"{type(self.error).__name__}: "
        return f"{self.backend}: the {self.part} were not compared: {kind}{self.error}"


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
        failures: Parts that could not be done, as with a backend that cannot load the graph; the others are here.
    """

    steps: tuple[StepResult, ...]
    layers: tuple[LayerResult, ...]
    compared_codes: Mapping[str, int]
    quantizers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failures: tuple[PartFailure, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all was compared, and no output differs by more than quantization noise, no layer beyond rounding."""
        return not self.failures and all(step.difference for step in self.steps) and not self.faults

    @property
    def faults(self) -> tuple[LayerResult, ...]:
        """The layers that rounding does not explain: first those of the first step, in the order they run."""
        return tuple(layer for layer in self.layers if not layer.difference)

    def codes(self, backend: str) -> list[CodesDifference]:
        """The differences in codes of one backend."""
        found = [layer.difference for layer in self.layers if layer.backend == backend]
        return [difference for difference in found if isinstance(difference, CodesDifference)]
