"""Is the deployed model the one that was quantized? Per time step, and layer by layer.

Read ``model`` first, then ``parts``, ``steps``, ``layers`` and ``metrics``.
"""

from modelopt_tdq.compare.backends import COMPARED, TORCH, WITHOUT_ENGINE, ComparedBackend
from modelopt_tdq.compare.layers import given_codes, returning_codes, with_given_codes
from modelopt_tdq.compare.metrics import (
    TOLERANCES,
    CodesDifference,
    OutputDifference,
    codes_difference,
    output_difference,
)
from modelopt_tdq.compare.model import compare_model
from modelopt_tdq.compare.printed import PrintedComparator
from modelopt_tdq.compare.results import LayerResult, ModelComparison, PartFailure, StepResult
from modelopt_tdq.compare.runners import session_runner, torch_runner
from modelopt_tdq.compare.steps import StepComparator
from modelopt_tdq.compare.table import render

__all__ = [
    "COMPARED",
    "TOLERANCES",
    "TORCH",
    "WITHOUT_ENGINE",
    "CodesDifference",
    "ComparedBackend",
    "LayerResult",
    "ModelComparison",
    "OutputDifference",
    "PartFailure",
    "PrintedComparator",
    "StepComparator",
    "StepResult",
    "codes_difference",
    "compare_model",
    "given_codes",
    "output_difference",
    "render",
    "returning_codes",
    "session_runner",
    "torch_runner",
    "with_given_codes",
]
