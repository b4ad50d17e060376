"""Reading a model's ScaleTable, and putting one into a model."""

from __future__ import annotations

import torch
from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.quantizer import TemporalQuantizer
from modelopt_tdq.table import ScaleTable

__all__ = ["scale_table", "set_scale_table", "temporal_quantizers"]


def temporal_quantizers(model: nn.Module) -> dict[str, TemporalQuantizer]:
    """The enabled temporal quantizers of ``model``, by name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TemporalQuantizer) and m.is_enabled}


def _require_temporal_quantizers(model: nn.Module) -> dict[str, TemporalQuantizer]:
    quantizers = temporal_quantizers(model)
    if not quantizers:
        raise TdqError(
            "model",
            type(model).__name__,
            "it has no enabled temporal quantizer",
            "Quantize it first: mtq.quantize(model, modelopt_tdq.TDQ_CONFIG, forward_loop)",
        )
    return quantizers


def scale_table(model: nn.Module) -> ScaleTable:
    """The scales of all enabled temporal quantizers of ``model``, copied to the CPU.

    Raises:
        TdqError: The model has none, or they are not calibrated, or their state is not loaded.
    """
    quantizers = _require_temporal_quantizers(model)
    missing = [name for name, quantizer in quantizers.items() if not quantizer.has_table]
    if missing:
        raise TdqError("model", missing, "these quantizers are not calibrated", "Calibrate the model first")
    empty = [n for n, q in quantizers.items() if q._scale.is_meta or bool(q._scale.isnan().any())]
    if empty:
        raise TdqError(
            "model",
            empty,
            "these quantizers were restored, but their scales were not loaded",
            "Load the state dict that was saved with the ModelOpt state",
        )
    longest = max(quantizers.values(), key=lambda q: q._scale.numel())
    timesteps = longest._timesteps.detach().cpu()
    rows = timesteps.numel()
    scale, offset = [], []
    for name, quantizer in quantizers.items():
        if quantizer._scale.numel() > 1 and not torch.equal(quantizer._timesteps.detach().cpu(), timesteps):
            raise TdqError("model", name, "its rows are not those of the other quantizers", "Calibrate the model again")
        scale.append(quantizer._scale.detach().cpu().expand(rows))
        offset.append(torch.zeros(rows) if quantizer.offset is None else quantizer.offset.detach().cpu().expand(rows))
    offsets = torch.stack(offset, 1)
    bits = {name: quantizer.num_bits for name, quantizer in quantizers.items()}
    return ScaleTable(
        timesteps,
        torch.stack(scale, 1),
        tuple(quantizers),
        offsets if bool(offsets.any()) else None,
        metadata={"num_bits": bits, "timestep_argument": longest._timestep.argument},
    )


def set_scale_table(model: nn.Module, table: ScaleTable) -> None:
    """Give every enabled temporal quantizer of ``model`` its column of ``table``.

    Raises:
        TdqError: The names in the table are not those of the model's quantizers, the table was made for
            other number formats, or it has a ``dequant_scale``, which fake quantization in PyTorch does
            not use. Nothing is changed then.
    """
    quantizers = _require_temporal_quantizers(model)
    unknown, missing = set(table.names) - set(quantizers), set(quantizers) - set(table.names)
    if unknown or missing:
        raise TdqError(
            "names",
            sorted(unknown or missing),
            "the model has no such quantizers" if unknown else "the table lacks these quantizers of the model",
            "Use a table made for this model and this quant_cfg",
        )
    if table.dequant_scale is not None:
        raise TdqError(
            "dequant_scale",
            tuple(table.dequant_scale.shape),
            "a separate dequantize scale is not supported here yet",
            "Leave it out",
        )
    formats = table.metadata.get("num_bits", {})
    for name, quantizer in quantizers.items():
        made_for = formats.get(name, quantizer.num_bits)
        made_for = tuple(made_for) if isinstance(made_for, list) else made_for  # JSON has no tuples
        if made_for != quantizer.num_bits:
            raise TdqError(
                "num_bits",
                made_for,
                f"the table was made for this format, but {name} has {quantizer.num_bits}",
                "Use a table made for this quant_cfg",
            )
    for column, name in enumerate(table.names):
        offset = None if table.offset is None else table.offset[:, column]
        if offset is not None and not bool(offset.any()):
            offset = None
        layer = model.get_submodule(name.rpartition(".")[0])
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        scale = table.scale[:, column].to(device)
        quantizers[name].set_rows(table.timesteps.to(device), scale, None if offset is None else offset.to(device))
