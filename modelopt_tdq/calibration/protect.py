"""Rows for which scales of their own are not convincingly better take the static ones.

Decided at the model's output, on replayed inputs.

For given inputs, the prediction at one time depends on that time's row alone, so rows can be decided
one by one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.core.distributed import gather
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.held_weights import held_weights
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.replay_ranks import all_samples

__all__ = ["Columns", "install", "prediction_error", "protected_rows", "recorded_outputs"]

#: An output is the same if what differs has less than this fraction of its energy: far less than what is judged.
_SAME = 1e-10

#: Samples of each time that are judged first: as many as a call has, but at least and at most so many.
_FEWEST, _FEW = 2, 4

#: A verdict by them is clear if the gain is this many of its standard deviations from none; at least so many degrees of
#: freedom tell of the deviation.
_CLEAR, _FREEDOM = 3.0, 4

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
    quantized: Callable[[], AbstractContextManager[None]] = nullcontext,
    most: int | None = None,
) -> dict[int, Tensor]:
    """Squared error of the model's output against ``references``, by the number of the call; filled where empty.

    Args:
        model: Quantized.
        replay: Recorded calls.
        times: Those that are run.
        references: Outputs in full precision, by the number of the call.
        description: Of the progress bar.
        progress: Show it.
        quantized: Entered around each call that is compared, where the model is not as it is to be judged.
        most: Samples of a call; None: all of a time.

    Returns:
        By row, [n, 2] float64 on the CPU: for each replayed sample of any process, the squared error and what of the
        reference is squared; the same in all processes.
    """
    found: dict[int, list[tuple[Sequence[float], Tensor]]] = defaultdict(list)
    bar = tqdm(replay.batches(times, most=most), description, len(times), disable=not progress, unit="step")
    with torch.no_grad():
        for number, batch in enumerate(bar):
            if number not in references:
                with full_precision(model):
                    references[number] = first_output(model(**batch.call)).float()
            reference = references[number]
            with quantized():
                output = first_output(model(**batch.call))
            if batch.counts:
                difference = output.float() - reference
                powers = [value.flatten(1).double().square().sum(1) for value in (difference, reference)]
                found[batch.row].append((batch.order, torch.stack(powers, 1)))
    return all_samples(found)


def _convincing(static: dict[int, Tensor], temporal: dict[int, Tensor], rows: int) -> Tensor:
    """[K] bool: the mean error falls by more than its standard error over the samples."""
    convincing = torch.zeros(rows, dtype=torch.bool)
    for row, error in static.items():
        gain = error - temporal[row]
        variance = (gain.square().mean() - gain.mean().square()).clamp(min=0.0)
        convincing[row] = gain.mean() > (variance / max(len(gain) - 1, 1)).sqrt()
    return convincing


def _clear(static: dict[int, Tensor], temporal: dict[int, Tensor]) -> set[int]:
    """Rows whose gain is far from none, of whichever sign, by these few samples.

    The deviation of so few is itself uncertain; so it is that of all rows together, or that of the row where it is
    larger. Gains are relative to the row's own error.
    """
    gains = {row: (error - temporal[row]) / error.mean() for row, error in static.items() if float(error.mean()) > 0}
    squares = {row: gain.sub(gain.mean()).square().sum() for row, gain in gains.items()}
    freedom = sum(len(gain) - 1 for gain in gains.values())
    if freedom < _FREEDOM:
        return set()
    pooled = sum(float(own) for own in squares.values()) / freedom
    clear = set()
    for row, gain in gains.items():
        variance = max(float(squares[row]) / max(len(gain) - 1, 1), pooled)
        if abs(float(gain.mean())) > _CLEAR * math.sqrt(variance / len(gain)):
            clear.add(row)
    return clear


def recorded_outputs(model: nn.Module, replay: Replay, times: list[float], most: int) -> dict[int, Tensor]:
    """Outputs of the calibration itself, by the number of the call; none unless the model gives the same again.

    It does not if it draws random numbers, or ran in other circumstances, as under autocast.
    """
    references = _outputs(replay, times, most)
    return references if references is not None and _comes_again(model, replay, times) else {}


def _outputs(replay: Replay, times: list[float], most: int) -> dict[int, Tensor] | None:
    """Those of the calibration, by the number of the call; None if one is not known, in any process."""
    references: dict[int, Tensor] = {}
    known = True
    for number, batch in enumerate(replay.batches(times, most=most)):
        known &= not batch.own or batch.output is not None
        references[number] = torch.zeros(()) if batch.output is None else batch.output.float()
    return references if all(gather(known)) else None


def _comes_again(model: nn.Module, replay: Replay, times: list[float]) -> bool:
    """Whether the model gives what it gave, at the first and at the last time; in all processes."""
    return _gives_again(model, replay, times[:1]) and _gives_again(model, replay, times[1:][-1:])


def _gives_again(model: nn.Module, replay: Replay, times: list[float]) -> bool:
    """Whether one sample of each time has the output that it had, in all processes."""
    same, seen = True, set()
    with full_precision(model), torch.no_grad():
        for batch in replay.batches(times, most=1):
            if batch.row in seen:
                continue
            seen.add(batch.row)
            found = first_output(model(**batch.call)).double()
            if batch.own:
                same &= batch.output is not None and _is_same(found, batch.output.to(found))
    return all(gather(same))


def _is_same(found: Tensor, known: Tensor) -> bool:
    return found.shape == known.shape and bool((found - known).square().sum() <= _SAME * known.square().sum())


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

    Two to four samples of each time are judged first, and the others only of those times at which these leave doubts.

    Returns:
        The columns, and [K] bool: the rows that were replaced.
    """
    rows = torch.tensor(times, dtype=torch.float32)
    most = replay.largest_batch
    comes_again = _outputs(replay, times, most) is not None and _comes_again(model, replay, times)

    def errors(part: Replay, at: list[float]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """With static scales, and with those over time: by row of all times, [n] of each sample."""
        references = (_outputs(part, at, most) if comes_again else None) or {}
        found = []
        for columns, description in ((static, "static scales"), (temporal, "scales over time")):
            install(model, quantizers, rows, columns)
            powers = prediction_error(model, part, at, references, description, progress, most=most)
            found.append({times.index(at[row]): own[:, 0] for row, own in powers.items()})
        return found[0], found[1]

    few, rest = replay.split(min(max(most, _FEWEST), _FEW))
    with held_weights(model):
        judged = errors(few, times)
        clear = _clear(*judged)
        doubtful = [time for row, time in enumerate(times) if row not in clear]
        for all_errors, more in zip(judged, errors(rest, doubtful) if doubtful else ({}, {}), strict=True):
            all_errors.update({row: torch.cat([all_errors[row], own]) for row, own in more.items()})
    worse = ~_convincing(*judged, len(times))

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
