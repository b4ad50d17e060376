"""Quantized denoisers of every family: the examples' tiny pipelines, calibrated by their own sampling; some alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.core.fake_quant import NumBits
from modelopt_tdq.pipeline.component import denoiser_name
from support.models import FAMILIES, fast_config
from support.pipelines import FAMILIES as PIPELINES

#: The families that have no pipeline among the examples, by their name in `support.models`.
_ALONE = ("unet", "plain", "cogvideox")

DENOISERS = (*PIPELINES, *_ALONE)

#: Rules for quantizers of the attention products, of all their operands.
ATTENTION_PRODUCTS = ("*[qkv]_bmm_quantizer", "*softmax_quantizer")


@dataclass(frozen=True)
class Denoiser:
    """A calibrated model, whose scales depend on time, and the arguments of one call."""

    model: nn.Module
    inputs: dict[str, Any]


def quantized_denoiser(
    name: str, bits: NumBits = 8, *, attention: bool = False, dtype: torch.dtype = torch.float32
) -> Denoiser:
    """One of :data:`DENOISERS`, calibrated over 4 steps; ``attention``: its products of activations as well."""
    config = fast_config(weight_bits=bits, activation_bits=bits)
    if attention:
        cfg = {"num_bits": bits, "axis": None}
        config["quant_cfg"] += [{"quantizer_name": rule, "cfg": cfg} for rule in ATTENTION_PRODUCTS]
    if name in _ALONE:
        torch.manual_seed(0)
        alone = FAMILIES[name]
        model = mtq.quantize(alone.make().eval(), config, alone.forward_loop())
        return _cast(Denoiser(model, alone.inputs(2, torch.tensor(300.0), 7)), dtype)
    family = PIPELINES[name]
    pipeline, call = family.tiny(), family.tiny_call(0)
    tdq.quantize_pipeline(pipeline, config, calls=[call], steps=4, progress=False)
    inputs = tdq.sample_inputs(pipeline, **call)
    return _cast(Denoiser(getattr(pipeline, denoiser_name(pipeline, None, "timestep")), inputs), dtype)


def _cast(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    def cast(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(dtype) if floats else value

    inputs = {n: v if n == "timestep" else cast(v) for n, v in denoiser.inputs.items()}
    return Denoiser(denoiser.model.to(dtype), inputs)


@contextlib.contextmanager
def one_row(model: nn.Module) -> Iterator[tdq.ScaleTable]:
    """Inside, every scale of ``model`` is that of the first row: a static model. Yields the table with all rows."""
    table = tdq.scale_table(model)
    first = {n: None if (v := getattr(table, n)) is None else v[:1] for n in _ARRAYS}
    tdq.set_scale_table(model, tdq.ScaleTable(table.timesteps[:1], names=table.names, **first))
    try:
        yield table
    finally:
        tdq.set_scale_table(model, table)


_ARRAYS = ("scale", "offset", "dequant_scale", "dequant_offset")
