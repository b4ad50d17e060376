# Configure: presets for mtq.quantize, and the configs of the algorithms.
from .config import RECIPES as RECIPES
from .config import TDQ_CONFIG as TDQ_CONFIG
from .config import TDQ_FP8_CFG as TDQ_FP8_CFG
from .config import TDQ_INT8_CFG as TDQ_INT8_CFG
from .config import TDQ_W3A3_CFG as TDQ_W3A3_CFG
from .config import TDQ_W4A4_CFG as TDQ_W4A4_CFG
from .config import TDQ_W4A8_CFG as TDQ_W4A8_CFG
from .config import TDQ_W8A4_CFG as TDQ_W8A4_CFG
from .config import TdqCalibConfig as TdqCalibConfig
from .config import TdqCorrectConfig as TdqCorrectConfig
from .config import make_config as make_config
from .config import recipe as recipe
from .training.config import TdqQatConfig as TdqQatConfig
from .reconstruction.config import TdqReconstructConfig as TdqReconstructConfig
from .temporal_features.config import TdqTemporalConfig as TdqTemporalConfig

# Look at a model, and quantize it: mtq.quantize, or a whole pipeline.
from .analysis.analyze import Analysis as Analysis
from .analysis.analyze import analyze as analyze
from .pipeline.quantize import quantize_pipeline as quantize_pipeline
from .pipeline.image_weights import image_weights as image_weights
from .pipeline.diffusers_config import diffusers_config as diffusers_config

# How much of it is quantized, and why the rest is not.
from .layer_coverage import Coverage as Coverage
from .layer_coverage import coverage as coverage

# The scales of a quantized model, the corrections of its layers, and what to do when its weights have changed.
from .core.table import ScaleTable as ScaleTable
from .model.quantizer import TemporalQuantizer as TemporalQuantizer
from .model.model_table import scale_table as scale_table
from .model.model_table import set_scale_table as set_scale_table
from .model.model_table import temporal_quantizers as temporal_quantizers
from .core.layer_correction import LayerCorrection as LayerCorrection
from .model.output_correction import layer_correction as layer_correction
from .model.output_correction import set_layer_correction as set_layer_correction
from .calibration.recalibrate import recalibrate_weights as recalibrate_weights

# Learn: quantization-aware training and reconstruction.
from .training.groups import interval_penalty as interval_penalty
from .training.groups import parameter_groups as parameter_groups
from .training.checkpointing import checkpoint as checkpoint
from .training.finite import require_finite as require_finite
from .training.learned import materialize as materialize
from .training.learned import stop_noise as stop_noise
from .training.learned import stop_learning as stop_learning
from .reconstruction.reconstruct import reconstruction_report as reconstruction_report

# Temporal features.
from .temporal_features.block import TemporalBlock as TemporalBlock
from .temporal_features.block import find_temporal_block as find_temporal_block
from .temporal_features.feature import Feature as Feature
from .temporal_features.table import FeatureTable as FeatureTable
from .temporal_features.given import set_feature_table as set_feature_table
from .temporal_features.report import TemporalReport as TemporalReport
from .temporal_features.report import temporal_report as temporal_report
from .temporal_features.runtime import feature_table as feature_table
from .temporal_features.runtime import free_modules as free_modules
from .temporal_features.runtime import remove_features as remove_features

# Export to ONNX.
from .export.onnx_export import export_onnx as export_onnx
from .export.report import ExportReport as ExportReport
from .export.table_input import engine_table as engine_table
from .export.static_scales import static_scales as static_scales
from .export.static_scales import write_static_checkpoint as write_static_checkpoint
from .export.static_scales import write_static_json as write_static_json
from .pipeline.inputs import sample_inputs as sample_inputs
from .pipeline.inputs import trajectory_inputs as trajectory_inputs

# Build engines, run them, and put them into a pipeline.
from .runtime.build.build import build_engine as build_engine
from .runtime.build.report import EngineReport as EngineReport
from .runtime.build.trtexec import trtexec_command as trtexec_command
from .runtime.sessions.onnxruntime import OnnxRuntimeSession as OnnxRuntimeSession
from .runtime.sessions.compiled_graph import compile_graph as compile_graph
from .runtime.sessions.openvino import OpenVinoSession as OpenVinoSession
from .runtime.sessions.tensorrt import TensorRTSession as TensorRTSession
from .runtime.sessions.open_session import open_session as open_session
from .pipeline.engine_denoiser import EngineDenoiser as EngineDenoiser
from .pipeline.swap import swap_denoiser as swap_denoiser
from .pipeline.swap import restore_denoiser as restore_denoiser
from .pipeline.by_time import time_boundary as time_boundary

# Compare what is deployed with what was quantized.
from .compare.model import compare_model as compare_model

# Errors that a user can mend, and warnings.
from .errors import MissingExtraError as MissingExtraError
from .errors import TdqError as TdqError
from .errors import TdqWarning as TdqWarning

__version__: str
