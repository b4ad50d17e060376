"""What export knows of the quantizers of a model: plain NumPy arrays, no torch, no ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits, code_range, quantize
from modelopt_tdq.core.schedule import edges
from modelopt_tdq.temporal_features.table import FeatureTable

__all__ = ["ActivationSpec", "CorrectionSpec", "QuantizationSpec", "WeightSpec"]


@dataclass(frozen=True)
class WeightSpec:
    """One weight quantizer.

    Attributes:
        name: As in ``model.named_modules()``.
        shape: Of the weight.
        num_bits: Number format of the codes.
        scale: float32, [C] along ``axis``, or [] per tensor.
        axis: Of the channels, or None per tensor.
        compute: Gives the codes.
    """

    name: str
    shape: tuple[int, ...]
    num_bits: NumBits
    scale: np.ndarray[Any, np.dtype[np.float32]]
    axis: int | None
    compute: Callable[[], np.ndarray[Any, np.dtype[Any]]] = field(repr=False)

    @property
    def codes(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The weight's shape; int8, or the bytes of FP8 E4M3 values as uint8.

        Computed each time: all of a large model take a quarter or a half of the memory of its weights.
        """
        return self.compute()

    @property
    def size(self) -> int:
        """Number of codes."""
        return math.prod(self.shape)

    @property
    def is_fp8(self) -> bool:
        """Whether the codes are FP8 E4M3."""
        return self.num_bits == FP8_E4M3

    @property
    def fits_int4(self) -> bool:
        """Whether a tensor of 4-bit integers can hold the codes."""
        return isinstance(self.num_bits, int) and self.num_bits <= 4


_Rows = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class ActivationSpec:
    """One activation quantizer.

    Attributes:
        name: As in ``model.named_modules()``.
        num_bits: Number format of the codes.
        scale: [K] float32, or [1] where it does not depend on time.
        offset: [K] or [1] float32, what is subtracted before dividing; None where it is 0.
        dequant_scale: [K] or [1] float32, the scale that turns codes back; None where scale and offset do.
        dequant_offset: [K] or [1] float32, the value of code 0 in a quantizer with ``dequant_scale``; None where 0.
        divisor: [C] or [C, 1, ...] float32, as it broadcasts against the activation: what its channels are divided by,
            and scale and offset of each are multiplied with; None where nothing.
        shift: [K', C] or [K', C, 1, ...] float32, what each channel's offset is more, of either kind; [1, C] where it
            does not depend on time; None where nothing.
    """

    name: str
    num_bits: NumBits
    scale: _Rows
    offset: _Rows | None = None
    dequant_scale: _Rows | None = None
    dequant_offset: _Rows | None = None
    divisor: _Rows | None = None
    shift: _Rows | None = None

    @property
    def value_scale(self) -> _Rows:
        """The scale that turns codes back into values."""
        return self.scale if self.dequant_scale is None else self.dequant_scale

    @property
    def value_offset(self) -> _Rows | None:
        """The offset that turns codes back into values: the value of code 0; None where it is 0."""
        return self.offset if self.dequant_scale is None else self.dequant_offset

    @property
    def moves_values(self) -> bool:
        """Whether the value of code 0 is another than 0, in some channel."""
        return self.value_offset is not None or self.shift is not None

    @property
    def is_shifted_over_time(self) -> bool:
        """Whether ``shift`` depends on time."""
        return self.shift is not None and len(self.shift) > 1

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code."""
        return code_range(self.num_bits)

    @property
    def is_fp8(self) -> bool:
        """Whether codes are FP8 E4M3 rather than integers."""
        return self.num_bits == FP8_E4M3

    @property
    def needs_clip(self) -> bool:
        """Whether the code range is smaller than that of the tensor that holds the codes."""
        return not self.is_fp8 and self.num_bits != 8

    @property
    def zero_has_a_code(self) -> bool:
        """Whether zero stays zero in every row, as explicit zero padding needs.

        True if the code of zero, turned back, is zero up to the float32 rounding of the offset.
        """
        if self.shift is not None:
            return False
        scale, offset = np.broadcast_arrays(self.scale, np.float32(0.0) if self.offset is None else self.offset)
        rows = torch.from_numpy(scale.copy()), torch.from_numpy(offset.copy())
        code = quantize(torch.zeros(scale.shape), *rows, self.num_bits).double().numpy()
        moved = np.zeros(1) if self.value_offset is None else self.value_offset.astype(np.float64)
        wanted = -moved / self.value_scale.astype(np.float64)
        return bool((np.abs(code - wanted) <= 1e-6 * np.maximum(1.0, np.abs(wanted))).all())


@dataclass(frozen=True)
class CorrectionSpec:
    """y <- gain * y + bias for the output channels of one layer.

    Attributes:
        layer: As in ``model.named_modules()``.
        gain: [K, C] float32, positive, or [1, C] where it does not depend on time.
        bias: Likewise.
        trailing: Dimensions of y behind that of the channels.
    """

    layer: str
    gain: _Rows
    bias: _Rows
    trailing: int

    @property
    def is_temporal(self) -> bool:
        """Whether it depends on time."""
        return len(self.gain) > 1


@dataclass(frozen=True)
class QuantizationSpec:
    """All that the graph needs to know about the quantizers of one model.

    Attributes:
        activations: By quantizer name.
        weights: By quantizer name.
        folded: Weight quantizers whose format ONNX cannot hold per channel: what computes their fake-quantized weights,
            which are deployed as floats, and the reason.
        timesteps: [K] float32, the times that the rows of the table stand for.
        timestep: Name of the model's argument that holds the time; None if nothing depends on it.
        features: The outputs of layers that are looked up, on the CPU; None if there are none.
        temporal: Names in the scale table: of the temporal quantizers, whether their scales depend on time or not, and
            whether their layers run or not.
        corrections: Of layers' outputs, by the name of the quantizer in whose place they are.
        correction_times: [K] float32, the times of their rows; None if none depends on time.
        shift_times: [K'] float32, those of the rows of shifts; None if none depends on time.
    """

    activations: dict[str, ActivationSpec]
    weights: dict[str, WeightSpec]
    folded: dict[str, tuple[Callable[[], np.ndarray[Any, np.dtype[np.float32]]], str]]
    timesteps: np.ndarray[Any, np.dtype[np.float32]]
    timestep: str | None
    features: FeatureTable | None = None
    temporal: tuple[str, ...] = ()
    corrections: dict[str, CorrectionSpec] = field(default_factory=dict)
    correction_times: _Rows | None = None
    shift_times: _Rows | None = None

    @property
    def edges(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[K - 1] float32, half-way points between the rows of the table."""
        halfway: np.ndarray[Any, np.dtype[np.float32]] = edges(torch.from_numpy(self.timesteps)).numpy()
        return halfway
