"""Whole diffusers pipelines: quantize their denoiser in place, and run them on an engine.

Read ``quantize`` first, then ``swap`` and ``engine_denoiser``.
"""

from modelopt_tdq.pipeline.diffusers_config import diffusers_config
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser
from modelopt_tdq.pipeline.inputs import sample_inputs, trajectory_inputs
from modelopt_tdq.pipeline.quantize import quantize_pipeline
from modelopt_tdq.pipeline.swap import swap_denoiser

__all__ = [
    "EngineDenoiser",
    "diffusers_config",
    "quantize_pipeline",
    "sample_inputs",
    "swap_denoiser",
    "trajectory_inputs",
]
