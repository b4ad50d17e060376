"""Reading a model's ScaleTable, and putting one into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.intact import checksum
from modelopt_tdq.model.learning import find_learning
from modelopt_tdq.model.place import execution_device, require_tensors_on_hand, require_unattended
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.wrapped import unwrapped

__all__ = ["checksum_of_channels", "divided_channels", "scale_table", "set_scale_table", "temporal_quantizers"]


def temporal_quantizers(model: nn.Module) -> dict[str, TemporalQuantizer]:
    """The enabled temporal quantizers of ``model``, by name, in module order."""
    modules = unwrapped(model).named_modules()
    return {n: m for n, m in modules if isinstance(m, TemporalQuantizer) and m.is_enabled}


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


def _require_tables(quantizers: dict[str, TemporalQuantizer]) -> None:
    measured = [name for name, quantizer in quantizers.items() if quantizer.no_table]
    if measured:
        raise TdqError("model", measured[:3], str(quantizers[measured[0]].no_table), "Train intervals of another kind")


def scale_table(model: nn.Module) -> ScaleTable:
    """The scales of all enabled temporal quantizers of ``model``, copied to the CPU.

    Raises:
        TdqError: The model has none, or they are not calibrated, or their state is not loaded or on disk.
    """
    model = unwrapped(model)
    require_tensors_on_hand(model, "show its scales", scales_only=True)
    quantizers = _require_temporal_quantizers(model)
    _require_tables(quantizers)
    learning = find_learning(model)
    if learning is not None:
        learning.refresh(model)
    missing = [name for name, quantizer in quantizers.items() if not quantizer.has_table]
    if missing:
        raise TdqError("model", missing, "these quantizers are not calibrated", "Calibrate the model first")
    empty = [n for n, q in quantizers.items() if any(_is_empty(value) for value in q.scales)]
    if empty:
        raise TdqError(
            "model",
            empty,
            "these quantizers were restored, but their scales were not loaded",
            "Load the state dict that was saved with the ModelOpt state",
        )
    for name, quantizer in quantizers.items():
        quantizer.require_usable(name)
    longest = max(quantizers.values(), key=lambda q: q._scale.numel())
    timesteps = longest._timesteps.detach().cpu()
    rows = timesteps.numel()
    columns = []
    for name, quantizer in quantizers.items():
        if quantizer._scale.numel() > 1 and not torch.equal(quantizer._timesteps.detach().cpu(), timesteps):
            raise TdqError("model", name, "its rows are not those of the other quantizers", "Calibrate the model again")
        columns.append(quantizer.scales.map(lambda value: value.detach().cpu().expand(rows)))
    differs = any(column.dequant_scale is not None for column in columns)
    metadata: dict[str, Any] = {
        "num_bits": {name: quantizer.num_bits for name, quantizer in quantizers.items()},
        "timestep_argument": longest._timestep.argument,
    }
    divided = divided_channels(quantizers)
    if divided:
        metadata["channel_divisors"] = divided
    return ScaleTable(
        timesteps,
        torch.stack([column.scale for column in columns], 1),
        tuple(quantizers),
        _offsets([column.offset for column in columns], rows),
        torch.stack([column.value_scale for column in columns], 1) if differs else None,
        metadata,
        _offsets([column.value_offset for column in columns], rows) if differs else None,
    )


def divided_channels(quantizers: Mapping[str, TemporalQuantizer]) -> dict[str, int]:
    """A checksum of what the channels in front of each quantizer are divided and shifted by; of those that are."""
    found = {}
    for name, quantizer in quantizers.items():
        divisor, shift = quantizer.channel_divisor, quantizer.channel_shift
        if divisor is not None or shift is not None:
            found[name] = checksum_of_channels(divisor, shift, None if shift is None else quantizer.shift_times)
    return found


def checksum_of_channels(divisor: Tensor | None, shift: Tensor | None, shift_times: Tensor | None) -> int:
    """Of a divisor, a shift with its times, or both; of a divisor alone, that of files that know no shifts."""
    given = [vector for vector in (shift, shift_times) if vector is not None]
    return int(checksum([torch.ones_like(given[0][:1]) if divisor is None else divisor, *given]))


def _is_empty(rows: Tensor | None) -> bool:
    return rows is not None and (rows.is_meta or bool(rows.isnan().any()))


def _offsets(columns: list[Tensor | None], rows: int) -> Tensor | None:
    """[K, Q], or None where all are 0."""
    stacked = torch.stack([torch.zeros(rows) if column is None else column for column in columns], 1)
    return stacked if bool(stacked.any()) else None


def set_scale_table(model: nn.Module, table: ScaleTable) -> None:
    """Give every enabled temporal quantizer of ``model`` its column of ``table``.

    A model that learns its scales keeps the table in eval mode, when it is saved, and when it is exported. Training
    would undo it, so a call in training mode is refused until :func:`~modelopt_tdq.materialize` or
    :func:`~modelopt_tdq.stop_learning` says which scales are to stay.

    Raises:
        TdqError: The names in the table are not those of the model's quantizers, the table was made for
            other number formats or with other smoothing of the channels, the quantizers measure their scales and use
            no table, or hooks around its layers would not know the new scales. Nothing is changed then.
    """
    model = unwrapped(model)
    require_unattended(model, "be given scales")
    quantizers = _require_temporal_quantizers(model)
    _require_tables(quantizers)
    table.require_names(quantizers, "model", "Use a table made for this model and this quant_cfg")
    bits = {name: quantizer.num_bits for name, quantizer in quantizers.items()}
    table.require_formats(bits, "model", "Use a table made for this quant_cfg")
    table.require_divisors(divided_channels(quantizers), quantizers, "model")
    for column, name in enumerate(table.names):
        layer = model.get_submodule(name.rpartition(".")[0])
        device = execution_device(layer)
        scales = table.column(column).map(lambda value, device=device: value.to(device))  # type: ignore[misc]
        quantizers[name].set_rows(table.timesteps.to(device), *scales)
    learning = find_learning(model)
    if learning is not None:
        learning.keep_tables()
