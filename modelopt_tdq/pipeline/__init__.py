"""Whole diffusers pipelines: quantize their denoiser in place, and run them on an engine.

Read ``quantize`` first, then ``swap``, ``engine_denoiser``, ``by_time`` and ``outputs``.
"""

from modelopt_tdq.pipeline.by_time import Boundary, EnginesByTime, time_boundary
from modelopt_tdq.pipeline.diffusers_config import diffusers_config
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser
from modelopt_tdq.pipeline.inputs import sample_inputs, trajectory_inputs
from modelopt_tdq.pipeline.quantize import quantize_pipeline
from modelopt_tdq.pipeline.swap import restore_denoiser, swap_denoiser

__all__ = [
    "Boundary",
    "EngineDenoiser",
    "EnginesByTime",
    "diffusers_config",
    "quantize_pipeline",
    "restore_denoiser",
    "sample_inputs",
    "swap_denoiser",
    "time_boundary",
    "trajectory_inputs",
]
