"""Presets for ``mtq.quantize``, and the configuration of the ``tdq`` algorithm."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from modelopt.torch.opt.config import ModeloptField
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from modelopt_tdq.core.fake_quant import SUPPORTED_BITS, NumBits
from modelopt_tdq.errors import TdqError
from modelopt_tdq.high_precision import HIGH_PRECISION
from modelopt_tdq.model.kinds import KINDS, TRANSPOSED_CONVOLUTION
from modelopt_tdq.recipes import RECIPES, read_recipe

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ALGORITHMS",
    "RECIPES",
    "TDQ_CONFIG",
    "TDQ_FP8_CFG",
    "TDQ_INT8_CFG",
    "TDQ_W3A3_CFG",
    "TDQ_W4A4_CFG",
    "TDQ_W4A8_CFG",
    "TDQ_W8A4_CFG",
    "CalibrationFields",
    "CorrectionFields",
    "ObjectiveFields",
    "RunFields",
    "TdqCalibConfig",
    "TdqCorrectConfig",
    "make_config",
    "recipe",
]


class RunFields(QuantizeAlgorithmConfig):  # type: ignore[misc]
    """What all algorithms of this package know about a run of ``forward_loop``."""

    _mutates_weights: ClassVar[bool] = False

    timestep_argument: str = ModeloptField(
        default="timestep", title="Argument of the model's forward that holds the time"
    )
    replay_samples: int = ModeloptField(
        default=8, ge=1, title="Samples per time kept, for what is judged by running the model again"
    )
    expected_calls: int | None = ModeloptField(
        default=None, ge=1, title="Model calls in one `forward_loop`; lets the progress bar tell the time left"
    )
    progress: bool = ModeloptField(default=True, title="Show progress bars")

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            config = handler(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"][:1]) or "algorithm"
            cure = f"Known fields: {', '.join(cls.model_fields)}"
            if field in cls.model_fields:
                cure = f"Allowed: {_allowed(cls, field)}"
            raise TdqError(field, first.get("input"), first["msg"], cure) from error
        return config


class ObjectiveFields(RunFields):
    """How the errors of several times are brought together."""

    time_weights: dict[float, float] | None = ModeloptField(
        default=None,
        title="How much an error at each time counts, by time",
        description=(
            "Squared errors count by the square; a time that is not named has the weight of the nearest. None: all "
            "alike. modelopt_tdq.image_weights(scheduler, steps) tells what errors do to the final sample; with these, "
            "static scales suit a few times and clip at the others: the bundled models fare better without. It acts "
            "where errors of several times are added or averaged: in one scale for several times (static, `bins`), the "
            "choice of bins, of offsets and of what channels are divided by, the codes of weights, corrections, and "
            "the loss of tdq_reconstruct; not where each time has a scale of its own."
        ),
    )

    @model_validator(mode="after")
    def _times_can_be_weighed(self) -> Self:
        weights = self.time_weights
        if weights is None:
            return self
        if not weights:
            raise TdqError("time_weights", weights, "no time has a weight", "Give one weight at least, or None")
        for time, weight in weights.items():
            if not math.isfinite(time) or not (math.isfinite(weight) and weight > 0.0):
                raise TdqError(
                    "time_weights",
                    {time: weight},
                    "times are finite numbers, and weights finite and positive",
                    "Leave this time out, or give it a small positive weight",
                )
        return self


class CalibrationFields(ObjectiveFields):
    """What all algorithms of this package know about calibration."""

    #: Why an algorithm rounds the weights of all layers in its own way; None: it rounds them as ``rounding`` says.
    _rounds_itself: ClassVar[str | None] = None

    statistic: Literal["max", "mse", "percentile", "entropy", "output"] = ModeloptField(
        default="mse",
        title="What a scale minimises",
        description=(
            "max: no clipping; percentile: clips the rest; entropy: KL divergence of the histograms; mse: the squared "
            "error of the activation; output: the squared error of the layer's output, over its real inputs and its "
            "quantized weights."
        ),
    )
    percentile: float = ModeloptField(
        default=99.99, gt=50.0, le=100.0, title="Coverage of `statistic: percentile`, in %"
    )
    bins: Literal["per_step", "optimal"] | int = ModeloptField(
        default="per_step",
        title="Intervals per quantizer",
        description=(
            "per_step: one per calibrated time; N: N contiguous groups of equal size (S_N of the paper; 1 is static); "
            "optimal: at most `max_bins` contiguous groups with the least squared error, by dynamic programming, where "
            "each group has the scale with the least squared error, as `statistic` mse or output then chooses it. The "
            "scales of other statistics are not searched with: that takes a scale for each of the K^2 / 2 groups of K "
            "times, for which entropy takes seconds per quantizer. Bins for their own scales would lower the squared "
            "error by up to 0.3 dB (max), 0.8 dB (percentile) and 7 dB (entropy at 8 bits, whose scales clip much), "
            "as seen on Gaussian, Laplace and one-sided activations with outliers, over 24 times in 4 groups."
        ),
    )
    max_bins: int = ModeloptField(default=8, ge=1, title="Budget of `bins: optimal`, per quantizer")
    keep_static_below: float | None = ModeloptField(
        default=None,
        ge=0.0,
        title="dB",
        description="A quantizer whose best single scale loses less than this against its scales over time is static.",
    )
    smoothing: float = ModeloptField(
        default=0.05,
        ge=0.0,
        le=1.0,
        title="Smoothing along time, as a fraction of the calibrated schedule",
        description=(
            "Neighbouring rows share their evidence with a Gaussian of this standard deviation (max: the envelope over "
            "two standard deviations), so that a row seen on few samples does not clip the outliers of unseen ones."
        ),
    )
    margin: Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)] = ModeloptField(
        default=0.0,
        title="Room above what calibration saw, as a fraction",
        description=(
            "Scales, and offsets with them, are larger by this fraction: values beyond those of the calibration data "
            "are not clipped, for 20 log10(1 + margin) dB of rounding noise at most. auto, which the recipes take: as "
            "far as ranges would grow with four times as many samples, as told by how they grew with those seen, the "
            "mean of all activations (of one that depends on time alone, and is the same in all samples, its own). The "
            "fewer the trajectories, the more it is worth: on a converged U-Net calibrated on four, with eight of its "
            "255 layers in high precision, 5 dB on others; on a DiT calibrated on sixteen 1 dB "
            "at 8 bits and 0.5 dB at 4."
        ),
    )
    channel_smoothing: Literal["none", "auto"] | Annotated[float, Field(ge=0.0, le=1.0)] = ModeloptField(
        default="none",
        title="Smoothing over channels",
        description=(
            "The channels of the inputs of linear layers and convolutions are divided by "
            "c = max|x|^a / max|w|^(1 - a), and the weights multiplied; a number is a, auto chooses: one for each "
            "tensor by the error of the layers' outputs, one for all, or none, by the error of the model's output. "
            "Exact, and free when deployed: c is part of the division by the scale. What is smoothed is calibrated by "
            "another run of `forward_loop`. Not together with ModelOpt's smoothquant, beside which auto does nothing."
        ),
    )
    channel_shift: Literal["none", "auto"] = ModeloptField(
        default="none",
        title="Shifts of channels",
        description=(
            "auto: the middle of each channel's range is subtracted in front of linear layers, and of convolutions "
            "without padding, where this lowers the error of their outputs: chosen together with `channel_smoothing`. "
            "Exact; when deployed, a constant of each channel beside the division by the scale, and part of the bias."
        ),
    )
    asymmetric: bool | Literal["auto"] = ModeloptField(
        default=False,
        title="Offset per step",
        description=(
            "auto: for those quantizers whose squared error, at the scales and offsets that they would get, falls by "
            "at least 1 dB (outputs of SiLU, say); with `statistic: output`, also that of the layer's output. An "
            "offset is a whole number of steps of the scale, and never raises the squared error over the data."
        ),
    )
    weights: Literal["max", "mse", "keep"] = ModeloptField(
        default="mse",
        title="ModelOpt's calibration of the weights",
        description=(
            "max: the largest magnitude; mse: the multiple of it with the least squared error, never worse than max, "
            "and the same as max at 8 bits, where clipping gains nothing; keep: they are calibrated already."
        ),
    )
    rounding: Literal["nearest", "compensated", "auto"] = ModeloptField(
        default="nearest",
        title="Codes of the weights of linear layers and convolutions",
        description=(
            "nearest: each weight by itself; compensated: those for which the layer's outputs over replayed inputs of "
            "all times differ least (GPTQ), which become the weights; auto: compensated where that pays, by samples "
            "that the codes were not chosen from; not where scales are kept, nor before weights are learned."
        ),
    )
    temporal: list[str] = ModeloptField(
        default=["*"], title="Globs over quantizer names: these follow time, the other activations get one scale"
    )
    protect_steps: bool = ModeloptField(
        default=True,
        title="Fall back to static scales per row",
        description=(
            "A row takes the static scales unless its own predict better on replayed calibration inputs, by more "
            "than a standard error."
        ),
    )
    max_steps: int = ModeloptField(default=1024, ge=2, title="Most different times that a calibration may visit")

    @model_validator(mode="after")
    def _can_be_calibrated(self) -> Self:
        if isinstance(self.bins, int) and self.bins < 1:
            raise TdqError("bins", self.bins, "not a positive number", "Use 'per_step', 'optimal', or a number of bins")
        if self.rounding == "compensated" and self._rounds_itself is not None:
            raise TdqError("rounding", self.rounding, self._rounds_itself, 'Use "rounding": "nearest" or "auto"')
        return self


class CorrectionFields(ObjectiveFields):
    """How the outputs of quantized layers are corrected."""

    correction: Literal["auto", "none", "static", "per_step"] = ModeloptField(
        default="auto",
        title="Gain and bias of each output channel of the quantized layers",
        description=(
            "Fitted to the full-precision outputs, layer by layer. static: one of each channel, which becomes part of "
            "the scales and biases of the weights; per_step: one per calibrated time, which needs no further node in "
            "the engine; auto: for each layer whichever has the least error on replayed samples that it was not fitted "
            "to, and none at all where the model predicts no better with them; with `bins: 1`, only static ones."
        ),
    )
    correction_budget: float = ModeloptField(
        default=64.0,
        gt=0.0,
        title="MiB",
        description=(
            "Most that gains and biases may take, as float32. Where those over time take more, the layers that gain "
            "least by them get static ones."
        ),
    )


class TdqCalibConfig(CalibrationFields, CorrectionFields):
    """Algorithm ``{"method": "tdq", ...}``: an activation scale per calibrated time, from one ``forward_loop``."""

    method: Literal["tdq"] = ModeloptField("tdq")


class TdqCorrectConfig(CorrectionFields):
    """Algorithm ``{"method": "tdq_correct", ...}``: correct the outputs of layers that are quantized already.

    Behind any other algorithm, of this package or of ModelOpt, as long as the weights are not folded.
    """

    method: Literal["tdq_correct"] = ModeloptField("tdq_correct")


#: The config of each algorithm, by its method.
ALGORITHMS: dict[str, type[RunFields]] = {"tdq": TdqCalibConfig, "tdq_correct": TdqCorrectConfig}


def _allowed(config: type[RunFields], field: str) -> str:
    info = config.model_fields[field]
    bounds = "".join(f", {bound!r}" for bound in info.metadata)
    return f"{str(info.annotation).replace('typing.', '')}{bounds}"


def _check_bits(field: str, bits: NumBits) -> None:
    if bits not in SUPPORTED_BITS or isinstance(bits, bool):
        raise TdqError(field, bits, "no supported number format", f"Use one of {SUPPORTED_BITS}")


def make_config(
    weight_bits: NumBits = 8,
    activation_bits: NumBits = 8,
    *,
    high_precision: Sequence[str] = HIGH_PRECISION,
    conv_transpose: bool = False,
    method: str = "tdq",
    **algorithm: Any,
) -> dict[str, Any]:
    """A config for ``mtq.quantize``: weights per channel, activations per tensor and per step.

    Args:
        weight_bits: Bits of an integer, or ``(4, 3)`` for FP8 E4M3.
        activation_bits: Likewise.
        high_precision: Globs of quantizers to leave alone.
        conv_transpose: Quantize transposed convolutions as well. TensorRT-RTX has no low-precision kernel for them, and
            :func:`modelopt_tdq.build_engine` refuses what is quantized and runs in float; OpenVINO has INT8 kernels,
            where there is no offset; ONNX Runtime computes all convolutions in float.
        method: The algorithm: ``"tdq"`` calibrates, ``"tdq_qat"`` and ``"tdq_reconstruct"`` learn.
        **algorithm: Fields of its config: :class:`TdqCalibConfig` and its kin.

    Raises:
        TdqError: A format, an algorithm or a field is not known.
    """
    weight_bits = tuple(weight_bits) if isinstance(weight_bits, list) else weight_bits
    activation_bits = tuple(activation_bits) if isinstance(activation_bits, list) else activation_bits
    _check_bits("weight_bits", weight_bits)
    _check_bits("activation_bits", activation_bits)
    if method not in ALGORITHMS:
        raise TdqError("method", method, "no algorithm of this package", f"Use one of {sorted(ALGORITHMS)}")
    ALGORITHMS[method](method=method, **algorithm)
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    kinds = [kind for kind in KINDS if kind.by_default or (conv_transpose and kind is TRANSPOSED_CONVOLUTION)]
    for layer, axis in [pair for kind in kinds for pair in kind.rules.items()]:
        weights = {"num_bits": weight_bits, "axis": axis}
        activations = {"num_bits": activation_bits, "axis": None}
        rules.append({"quantizer_name": "*weight_quantizer", "parent_class": layer, "cfg": weights})
        rules.append({"quantizer_name": "*input_quantizer", "parent_class": layer, "cfg": activations})
    rules += [{"quantizer_name": pattern, "enable": False} for pattern in high_precision]
    return {"quant_cfg": rules, "algorithm": {"method": method, **algorithm}}


def recipe(name: str) -> dict[str, Any]:
    """The config of a bundled recipe, or of a YAML file with the arguments of :func:`make_config`.

    Raises:
        TdqError: There is no such recipe or file, or it does not hold arguments of :func:`make_config`.
    """
    arguments = read_recipe(name)
    algorithm = arguments.pop("algorithm", None) or {}
    return copy.deepcopy(make_config(**arguments, **algorithm))


TDQ_INT8_CFG = recipe("int8")
TDQ_FP8_CFG = recipe("fp8")
TDQ_W8A4_CFG = recipe("w8a4")
TDQ_W4A8_CFG = recipe("w4a8")
TDQ_W4A4_CFG = recipe("w4a4")
TDQ_W3A3_CFG = recipe("w3a3")
#: W8A8, the one to start with.
TDQ_CONFIG = TDQ_INT8_CFG
