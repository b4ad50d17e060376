"""Rows for which scales of their own are not convincingly better take the static ones.

Decided at the model's output, on replayed inputs.

For given inputs, the prediction at one time depends on that time's row alone, so rows can be decided
one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.core.distributed import all_reduce
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.replay import Replay

__all__ = ["Columns", "install", "prediction_error", "protected_rows"]

#: Scale [K] and offset [K] (or None) of each quantizer.
Columns = dict[str, tuple[Tensor, "Tensor | None"]]


def install(model: nn.Module, quantizers: dict[str, TemporalQuantizer], times: Tensor, columns: Columns) -> None:
    """Give each quantizer its column, where its layer computes."""
    for name, (scale, offset) in columns.items():
        device = execution_device(model.get_submodule(name.rpartition(".")[0]))
        quantizers[name].set_rows(times.to(device), scale.to(device), None if offset is None else offset.to(device))


def prediction_error(
    model: nn.Module,
    replay: Replay,
    times: list[float],
    references: dict[int, Tensor],
    description: str,
    progress: bool,
) -> dict[int, Tensor]:
    """Squared error of the model's output against ``references``, which is filled where empty.

    Returns:
        By row, [n] float64: one number per replayed sample.
    """
    error = {}
    with torch.no_grad():
        for row, call in tqdm(replay.batches(times), description, len(times), disable=not progress, unit="step"):
            if row not in references:
                with full_precision(model):
                    references[row] = first_output(model(**call)).float()
            difference = first_output(model(**call)).float() - references[row]
            error[row] = difference.flatten(1).double().square().sum(1).cpu()
    return error


def _convincing(static: dict[int, Tensor], temporal: dict[int, Tensor], rows: int) -> Tensor:
    """[K] bool: the mean error falls by more than its standard error over the samples."""
    sums = torch.zeros(rows, 3, dtype=torch.float64)
    for row, error in static.items():
        gain = error - temporal[row]
        sums[row] = torch.stack([torch.tensor(float(len(gain))), gain.sum(), gain.square().sum()])
    number, total, squares = all_reduce(sums, "sum").unbind(1)
    mean = total / number.clamp(min=1.0)
    variance = (squares / number.clamp(min=1.0) - mean.square()).clamp(min=0.0)
    return mean > (variance / (number - 1.0).clamp(min=1.0)).sqrt()


def protected_rows(
    model: nn.Module,
    quantizers: dict[str, TemporalQuantizer],
    replay: Replay,
    times: list[float],
    temporal: Columns,
    static: Columns,
    progress: bool,
) -> tuple[Columns, Tensor]:
    """``temporal`` with some of its rows replaced by those of ``static``.

    Returns:
        The columns, and [K] bool: the rows that were replaced.
    """
    rows = torch.tensor(times, dtype=torch.float32)
    references: dict[int, Tensor] = {}
    errors = []
    for columns, description in ((static, "static scales"), (temporal, "scales over time")):
        install(model, quantizers, rows, columns)
        errors.append(prediction_error(model, replay, times, references, description, progress))
    worse = ~_convincing(errors[0], errors[1], len(times))

    def merged(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None and old is None:
            return None
        zero = torch.zeros(len(times))
        return torch.where(worse, zero if old is None else old, zero if new is None else new)

    columns = {}
    for name, (scale, offset) in temporal.items():
        static_scale, static_offset = static[name]
        columns[name] = (torch.where(worse, static_scale, scale), merged(offset, static_offset))
    return columns, worse
