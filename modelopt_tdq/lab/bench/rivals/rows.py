"""The rows of the comparison, in the order of the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.rivals import others, ours
from modelopt_tdq.lab.bench.rivals.setting import Setting, is_linear

__all__ = ["ROWS", "Row", "chosen_rows", "made", "row_layers"]

#: Of products of one layer on an H100, against a constant scale: benchmarks/results/gpu.
_CONSTANT = "a constant"
_LOOKUP = "a lookup per call, 2 µs for all layers; products 0.99 to 1.00 of a constant's time"
_PER_TENSOR = "a reduction per layer and call; INT8 products 1.10 to 1.49, FP8 1.12 to 1.45 of a constant's time"
_PER_TOKEN = "a reduction per layer and call; INT8 products 1.09 to 1.47 of a constant's time"


def _keeps_none(name: str, layer: nn.Module) -> bool:
    return False


def _keeps_convolutions(name: str, layer: nn.Module) -> bool:
    return not is_linear(layer)


def _keeps_nvidias(name: str, layer: nn.Module) -> bool:
    return any(part in name for part in others.NVIDIA_HIGH_PRECISION)


def _always(setting: Setting) -> bool:
    return True


def _has_linear(setting: Setting) -> bool:
    return any(is_linear(layer) for layer in setting.layers.values())


def _has_convolutions(setting: Setting) -> bool:
    return any(not is_linear(layer) for layer in setting.layers.values())


def _has_both(setting: Setting) -> bool:
    return _has_linear(setting) and _has_convolutions(setting)


def _nvidia(setting: Setting) -> bool:
    """Its convolutions are what differs from plain max; the example has it for integers alone."""
    return _has_convolutions(setting) and isinstance(setting.bits.activations, int)


def _learns_rounding(setting: Setting) -> bool:
    return isinstance(setting.bits.weights, int) and setting.bits.weights < 8


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        name: On the command line, and in the results.
        title: In the tables.
        what: What it does, in one line.
        costs: What its activation scales cost when deployed.
        group: Whose it is; static: scales of ours that do not follow time.
        make: Setting to a quantized model.
        keeps: Of a layer of the recipe, by its name: whether it stays in high precision.
        applies: To which settings.
        long: Takes much longer than the others; left out unless asked for.
    """

    name: str
    title: str
    what: str
    costs: str
    group: Literal["others", "static", "ours"]
    make: Callable[[Setting], nn.Module]
    keeps: Callable[[str, nn.Module], bool] = _keeps_none
    applies: Callable[[Setting], bool] = _always
    long: bool = False


_ALL = (
    Row(
        "nvidia",
        "NVIDIA percentile, 32 prompts",
        "NVIDIA's diffusers example, its SDXL command: convolutions by the mean largest magnitude of the step where it "
        "is smallest, times 0.8, as it divides a sum over 16 batches by 20 steps; linear layers by the largest "
        "magnitude",
        _CONSTANT,
        "others",
        others.nvidia(others.PROMPTS_32),
        applies=_nvidia,
    ),
    Row(
        "nvidia-64",
        "NVIDIA percentile, 64 prompts",
        "the same with the example's other recommendation, which makes it times 1.6",
        _CONSTANT,
        "others",
        others.nvidia(others.PROMPTS_64),
        applies=_nvidia,
    ),
    Row(
        "nvidia-layers",
        "NVIDIA percentile, its layers",
        "as with 64 prompts, but layers that the example leaves alone stay in high precision: shortcuts, too",
        _CONSTANT,
        "others",
        others.nvidia(others.PROMPTS_64, keeps=_keeps_nvidias),
        keeps=_keeps_nvidias,
        applies=lambda setting: _nvidia(setting) and any(_keeps_nvidias(n, m) for n, m in setting.layers.items()),
    ),
    Row(
        "nvidia-smoothquant",
        "NVIDIA percentile, SmoothQuant",
        "convolutions as with 64 prompts, linear layers by ModelOpt's SmoothQuant, alpha 0.8, which the example's "
        "command names and its --quant-algo smoothquant turns on",
        _CONSTANT + ", and a product with a vector of channels in front of linear layers, where no norm takes it",
        "others",
        others.nvidia(others.PROMPTS_64, smoothquant=True),
        applies=lambda setting: _has_linear(setting) and setting.bits.is_int8,
    ),
    Row(
        "max",
        "ModelOpt max",
        'ModelOpt\'s {"method": "max"} as shipped, on weights and activations: the default of NVIDIA\'s example',
        _CONSTANT,
        "others",
        others.modelopt("max"),
    ),
    Row(
        "mse",
        "ModelOpt mse",
        'ModelOpt\'s {"method": "mse"} as shipped: it searches scales of weights alone, activations have those of max',
        _CONSTANT,
        "others",
        others.modelopt("mse"),
    ),
    Row(
        "dynamic-tensor",
        "dynamic per tensor, linear layers",
        "torchao (PerTensor): the largest magnitude of each image of each call; convolutions in high precision",
        _PER_TENSOR,
        "others",
        others.dynamic(others.PER_TENSOR, convolutions=False),
        keeps=_keeps_convolutions,
        applies=_has_linear,
    ),
    Row(
        "dynamic-tensor-all",
        "dynamic per tensor, static convolutions",
        "linear layers dynamic per tensor, convolutions with a constant scale, the largest magnitude",
        _PER_TENSOR,
        "others",
        others.dynamic(others.PER_TENSOR, convolutions=True),
        applies=_has_both,
    ),
    Row(
        "dynamic-token",
        "dynamic per token, linear layers",
        "torchao (its default, PerRow; vLLM-Omni's INT8 measures at run time as well): the largest magnitude of each "
        "vector of channels of each call; convolutions in high precision",
        _PER_TOKEN,
        "others",
        others.dynamic(others.PER_TOKEN, convolutions=False),
        keeps=_keeps_convolutions,
        applies=_has_linear,
    ),
    Row(
        "dynamic-token-all",
        "dynamic per token, static convolutions",
        "linear layers dynamic per token, convolutions with a constant scale, the largest magnitude",
        _PER_TOKEN,
        "others",
        others.dynamic(others.PER_TOKEN, convolutions=True),
        applies=_has_both,
    ),
    Row(
        "pruna",
        "Pruna time-aware FP8",
        "Pruna 0.3.5: linear layers, the largest magnitude of each calibrated time, the nearest time's at run time; "
        "its weights have one scale per tensor, here one per channel; convolutions in high precision",
        "a lookup per call",
        "others",
        others.pruna,
        keeps=_keeps_convolutions,
        applies=lambda setting: _has_linear(setting) and setting.bits.is_fp8,
    ),
    Row(
        "static",
        "static",
        "one scale per quantizer, that with the least squared error of the activation (bins 1 here; ModelOpt's "
        "algorithms search none for activations)",
        _CONSTANT,
        "static",
        ours.stage(bins=1),
    ),
    Row(
        "static-all",
        "static, with everything else ours",
        "as static, with offsets, smoothing and static shifts of channels, a margin, rounding by the inputs, static "
        "corrections",
        _CONSTANT,
        "static",
        ours.static_with_everything,
    ),
    Row(
        "time-linear",
        "scales over time, linear layers",
        "to compare with the rows that leave convolutions in high precision",
        _LOOKUP,
        "ours",
        ours.time_linear,
        keeps=_keeps_convolutions,
        applies=_has_both,
    ),
    Row("time", "scales over time", "a scale per quantizer and time", _LOOKUP, "ours", ours.stage()),
    Row(
        "offsets",
        "+ offsets",
        "and an offset, where it pays",
        _LOOKUP,
        "ours",
        ours.stage(**ours.OFFSETS),
    ),
    Row(
        "smoothing",
        "+ smoothing",
        "and inputs divided by a vector of channels, which is part of the division by the scale",
        _LOOKUP,
        "ours",
        ours.stage(**ours.OFFSETS, **ours.SMOOTHING),
    ),
    Row(
        "shifts",
        "+ shifts",
        "and the middle of each channel's range over time subtracted, where nothing pads: an offset of each channel, "
        "and part of the bias",
        _LOOKUP,
        "ours",
        ours.stage(**ours.OFFSETS, **ours.SMOOTHING, **ours.SHIFTS),
    ),
    Row(
        "margin",
        "+ margin",
        "and room above the ranges that calibration saw, by how they grew with its samples",
        _LOOKUP,
        "ours",
        ours.stage(**ours.OFFSETS, **ours.SMOOTHING, **ours.SHIFTS, **ours.MARGIN),
    ),
    Row(
        "rounding",
        "+ rounding",
        "and weights rounded by what their layers read (GPTQ), convolutions among them",
        _LOOKUP,
        "ours",
        ours.stage(**ours.OFFSETS, **ours.SMOOTHING, **ours.SHIFTS, **ours.MARGIN, **ours.ROUNDING),
    ),
    Row(
        "corrections",
        "+ corrections",
        "and gains and biases of output channels over time, in the factor and the bias behind each product",
        _LOOKUP,
        "ours",
        ours.stage(**ours.EVERYTHING),
    ),
    Row(
        "reconstruction",
        "+ reconstruction",
        "and rounding learned block by block instead, with the scales, from the calibration data (minutes to hours)",
        _LOOKUP,
        "ours",
        ours.reconstructed,
        applies=_learns_rounding,
        long=True,
    ),
    Row(
        "qat",
        "+ QAT",
        "weights and scales trained on images instead, behind offsets and smoothing, without corrections",
        _LOOKUP,
        "ours",
        ours.qat,
        applies=lambda setting: (
            _learns_rounding(setting) and setting.bits.activations == 4 and setting.images is not None
        ),
        long=True,
    ),
)

#: By name.
ROWS = {row.name: row for row in _ALL}


def chosen_rows(only: Sequence[str], long: bool) -> list[Row]:
    """Those to run, in the order of the tables.

    Args:
        only: Names; empty for all.
        long: Those that take long as well, if no names are given.

    Raises:
        TdqError: There is no row of a name.
    """
    for name in only:
        if name not in ROWS:
            raise TdqError("only", name, "no such row", f"Use some of {', '.join(ROWS)}")
    return [row for row in _ALL if (row.name in only if only else long or not row.long)]


def row_layers(row: Row, setting: Setting) -> set[str]:
    """Names of the layers that the row quantizes."""
    return {name for name, layer in setting.layers.items() if not row.keeps(name, layer)}


def made(row: Row, setting: Setting) -> nn.Module:
    """The model of a row that applies to the setting."""
    return row.make(setting)
