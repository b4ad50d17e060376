"""Is the deployed model the one that was quantized? Per time step, and layer by layer."""

from modelopt_tdq.compare.metrics import CodesDifference, OutputDifference, codes_difference, output_difference
from modelopt_tdq.compare.model import LayerResult, ModelComparison, StepResult, compare_model
from modelopt_tdq.compare.runners import session_runner, torch_runner
from modelopt_tdq.compare.steps import StepComparator
from modelopt_tdq.compare.table import render

__all__ = [
    "CodesDifference",
    "LayerResult",
    "ModelComparison",
    "OutputDifference",
    "StepComparator",
    "StepResult",
    "codes_difference",
    "compare_model",
    "output_difference",
    "render",
    "session_runner",
    "torch_runner",
]
