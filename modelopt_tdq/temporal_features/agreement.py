"""Whether two calls of a model compute its temporal layers' outputs in the same way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.temporal_features.dataflow import Watched
from modelopt_tdq.temporal_features.numbering import Number
from modelopt_tdq.temporal_features.tape import Tape
from modelopt_tdq.temporal_features.trace import Leave, Run

__all__ = ["disagreeing", "near", "outputs_of"]

_log = logging.getLogger(__name__)

#: Of a row, relative to its length: other numbers of rows round differently.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 3e-2

_Outputs = dict[str, list[Number]]


def outputs_of(run: Run, numbers: Mapping[int, Number], layers: Iterable[str]) -> _Outputs:
    """The numbers of the outputs of layers, call by call."""
    found: _Outputs = {name: [] for name in layers}
    for place, event in enumerate(run.events):
        if isinstance(event, Leave) and event.layer in found and place in numbers:
            found[event.layer].append(numbers[place])
    return found


def _rows(model: nn.Module, tape: Tape, layers: list[str], time: Tensor) -> dict[str, list[Tensor]]:
    """The first row of these layers' outputs at one time, call by call."""
    with full_precision(model), torch.no_grad():
        made = tape.only(layers).run(model, time.expand(tape.times))
    return {name: [value[:1] for value in values] for name, values in made.items()}


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two rows are equal but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    error = (one.double() - other.double()).norm()
    return bool(error <= _TOLERANCE.get(one.dtype, _COARSE) * other.double().norm())


def disagreeing(
    model: nn.Module, found: Watched, outputs: tuple[_Outputs, _Outputs], runs: tuple[int, int], time: Tensor
) -> tuple[set[str], set[str]]:
    """The layers whose outputs one run computes from the time in a way of its own.

    Operators and their arguments are compared. Where only sizes, axes or indices differ, the layers run: their first
    rows must be equal but for rounding. Layers on the meta device cannot run; there such a difference does not count.

    Args:
        model: Whose layers they are.
        found: In all runs.
        outputs: Of the temporal layers, in the two runs.
        runs: Which two.
        time: [1] float32, a time to compare at.

    Returns:
        Those of the first run, those of the second.
    """
    one, other = outputs
    alike: list[set[str]] = [{n.alike for ns in each.values() for n in ns} for each in outputs]
    exact: list[set[str]] = [{n.exact for ns in each.values() for n in ns} for each in outputs]
    different = (_missing(one, alike[1]), _missing(other, alike[0]))
    unsure = sorted({name for name, ns in one.items() if any(n.exact not in exact[1] for n in ns)} - different[0])
    unsure = [name for name in unsure if name in other and name not in different[1]]
    if not unsure or any(parameter.is_meta for parameter in model.parameters()):
        return different
    try:
        first, second = (_rows(model, found.tapes[run], unsure, time) for run in runs)
    except Exception as error:
        _log.info("the temporal layers cannot be compared: %s", error)
        return different[0] | set(unsure), different[1] | set(unsure)
    for name in unsure:
        known = {number.alike: row for number, row in zip(other[name], second[name], strict=True)}
        pairs = zip(one[name], first[name], strict=True)
        if not all(number.alike in known and near(row, known[number.alike]) for number, row in pairs):
            different[0].add(name)
            different[1].add(name)
    return different


def _missing(outputs: _Outputs, there: set[str]) -> set[str]:
    return {name for name, numbers in outputs.items() if any(number.alike not in there for number in numbers)}
