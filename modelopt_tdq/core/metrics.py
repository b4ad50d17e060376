"""How far a quantized model is from the full-precision one: SQNR of predictions, PSNR of images."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["db_text", "decibels", "json_number", "json_numbers", "psnr_db", "require_same_shape", "sqnr_db"]


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise ratio, over all elements together.

        10 log10( sum(reference^2) / sum((value - reference)^2) )

    Args:
        reference: Any shape and real dtype; what full precision gives.
        value: The same shape; what the quantized model gives.

    Returns:
        In dB; infinite where the two agree exactly, NaN where one holds NaN.

    Raises:
        TdqError: The shapes differ.
    """
    noise = _squared_error(reference, value)
    return decibels(float(reference.detach().double().square().sum()), noise)


def psnr_db(reference: Tensor, value: Tensor, data_range: float = 2.0) -> float:
    """Peak signal to noise ratio, over all elements of all images together.

        10 log10( data_range^2 / mean((value - reference)^2) )

    Args:
        reference: Any shape, usually images [B, C, H, W].
        value: The same shape.
        data_range: Largest value minus smallest value of the format: 2 for images in [-1, 1], 255 for bytes.

    Returns:
        In dB; infinite where the two agree exactly, NaN where one holds NaN.

    Raises:
        TdqError: The shapes differ, the images are empty, or the range is not positive.
    """
    if not data_range > 0.0:
        raise TdqError("data_range", data_range, "not positive", "Pass 2 for images in [-1, 1]")
    if reference.numel() == 0:
        raise TdqError("reference", tuple(reference.shape), "it is empty", "Pass at least one image")
    noise = _squared_error(reference, value)
    return decibels(data_range * data_range * reference.numel(), noise)


def require_same_shape(reference: Tensor, value: Tensor, field: str, cure: str) -> None:
    """Raise a TdqError unless ``value``, of the argument ``field``, has the shape of ``reference``."""
    if reference.shape != value.shape:
        problem = f"not of the shape of the reference, {tuple(reference.shape)}"
        raise TdqError(field, tuple(value.shape), problem, cure)


def _squared_error(reference: Tensor, value: Tensor) -> float:
    require_same_shape(reference, value, "value", "Compare results of the same input")
    return float((value.detach().double() - reference.detach().double()).square().sum())


def decibels(signal: float, noise: float) -> float:
    """Ratio of two powers (sums of squares) in dB: ``10 log10(signal / noise)``.

    Returns:
        Infinite if there is no noise, minus infinite if there is noise and no signal, NaN if one is NaN.
    """
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise)) if signal > 0.0 else -math.inf


def db_text(value: float | None, digits: int = 1) -> str:
    """``"39.2"``; ``"inf"`` for perfect agreement; ``"-"`` for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}"


def json_number(value: float) -> float | str:
    """The number itself, or ``"inf"``, ``"-inf"``, ``"nan"``: JSON has none of these, and ``float()`` reads them."""
    return value if math.isfinite(value) else str(value)


def json_numbers(data: Any) -> Any:
    """Nested data with every number as :func:`json_number` writes it."""
    if isinstance(data, float):
        return json_number(data)
    if isinstance(data, dict):
        return {key: json_numbers(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [json_numbers(value) for value in data]
    return data
