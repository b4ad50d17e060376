"""Time-step-aware quantization for diffusion models: a plugin to NVIDIA ModelOpt.

Importing this package registers the calibration algorithm ``{"method": "tdq"}`` with ModelOpt. It has
to be imported before a model quantized with it is restored.
"""

from modelopt_tdq.analysis import Analysis, analyze
from modelopt_tdq.calibration.mode import register as _register
from modelopt_tdq.config import RECIPES, TdqCalibConfig, make_config, recipe
from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.export import ExportReport, export_onnx
from modelopt_tdq.model_table import scale_table, set_scale_table, temporal_quantizers
from modelopt_tdq.pipeline import (
    EngineDenoiser,
    diffusers_config,
    quantize_pipeline,
    sample_inputs,
    swap_denoiser,
    trajectory_inputs,
)
from modelopt_tdq.quantizer import TemporalQuantizer
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.reconstruct import reconstruction_report
from modelopt_tdq.runtime.build import build_engine
from modelopt_tdq.runtime.engine_report import EngineReport
from modelopt_tdq.runtime.tensorrt import TensorRTSession
from modelopt_tdq.runtime.trtexec import trtexec_command
from modelopt_tdq.table import ScaleTable
from modelopt_tdq.temporal_features.block import TemporalBlock, find_temporal_block
from modelopt_tdq.temporal_features.config import TdqTemporalConfig
from modelopt_tdq.temporal_features.given import set_feature_table
from modelopt_tdq.temporal_features.mode import register as _register_temporal
from modelopt_tdq.temporal_features.report import TemporalReport, temporal_report
from modelopt_tdq.temporal_features.runtime import feature_table, free_modules, remove_features
from modelopt_tdq.temporal_features.table import Feature, FeatureTable
from modelopt_tdq.training.checkpointing import checkpoint
from modelopt_tdq.training.config import TdqQatConfig
from modelopt_tdq.training.finite import require_finite
from modelopt_tdq.training.groups import interval_penalty, parameter_groups
from modelopt_tdq.training.learned import materialize
from modelopt_tdq.training.mode import register as _register_learning
from modelopt_tdq.training.noise import stop_noise

__version__ = "0.1.0"

_register()
_register_learning()
_register_temporal()

TDQ_INT8_CFG = recipe("int8")
TDQ_FP8_CFG = recipe("fp8")
TDQ_W8A4_CFG = recipe("w8a4")
TDQ_W4A8_CFG = recipe("w4a8")
TDQ_W4A4_CFG = recipe("w4a4")
TDQ_W3A3_CFG = recipe("w3a3")
TDQ_CONFIG = TDQ_INT8_CFG

__all__ = [
    "RECIPES",
    "TDQ_CONFIG",
    "TDQ_FP8_CFG",
    "TDQ_INT8_CFG",
    "TDQ_W3A3_CFG",
    "TDQ_W4A4_CFG",
    "TDQ_W4A8_CFG",
    "TDQ_W8A4_CFG",
    "Analysis",
    "EngineDenoiser",
    "EngineReport",
    "ExportReport",
    "Feature",
    "FeatureTable",
    "MissingExtraError",
    "ScaleTable",
    "TdqCalibConfig",
    "TdqError",
    "TdqQatConfig",
    "TdqReconstructConfig",
    "TdqTemporalConfig",
    "TemporalBlock",
    "TemporalQuantizer",
    "TemporalReport",
    "TensorRTSession",
    "analyze",
    "build_engine",
    "checkpoint",
    "diffusers_config",
    "export_onnx",
    "feature_table",
    "find_temporal_block",
    "free_modules",
    "interval_penalty",
    "make_config",
    "materialize",
    "parameter_groups",
    "quantize_pipeline",
    "recipe",
    "reconstruction_report",
    "remove_features",
    "require_finite",
    "sample_inputs",
    "scale_table",
    "set_feature_table",
    "set_scale_table",
    "stop_noise",
    "swap_denoiser",
    "temporal_quantizers",
    "temporal_report",
    "trajectory_inputs",
    "trtexec_command",
]
