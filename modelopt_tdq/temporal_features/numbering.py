"""Value numbering: two values of recorded runs with the same number were computed in the same way.

A number is a digest of the operator, of the numbers of its operands, and of all else that it was given. It has two
forms: the exact one, and one that leaves out integers where an operator takes sizes, axes and indices; ``x.expand(2,
4)`` and ``x.expand(3, 4)`` are alike in the latter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from modelopt_tdq.temporal_features.tape import Parameter, Slot
from modelopt_tdq.temporal_features.trace import Leave, Operation, Run, has_schema

__all__ = ["Number", "numbered"]


class Number(NamedTuple):
    """How a value was computed, as digests: in all details, and but for sizes, axes and indices."""

    exact: str
    alike: str


_UNKNOWN = Number("unknown", "unknown")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _both(text: str) -> Number:
    return Number(text, text)


class _Numbering:
    """Of the values of several runs, which go through in order."""

    def __init__(self) -> None:
        self._values: dict[int, Number] = {}
        self._contents: dict[int, Number] = {}
        self._constants: dict[int, tuple[Tensor, Number]] = {}

    def run(self, run: Run, temporal: frozenset[int]) -> dict[int, Number]:
        """The number of each operator, and of the output of each call of a layer, by its place in the events."""
        for name, slot in run.labels:
            self._values[slot.number] = _both(_digest("input", name))
        found: dict[int, Number] = {}
        for place, event in enumerate(run.events):
            if isinstance(event, Operation):
                number = self._operation(event) if place in temporal else _both(_digest(str(run.time), str(place)))
                found[place] = number
                self._results(event, number)
            elif isinstance(event, Leave):
                outputs = [self._value(slot) for slot in event.outputs if slot is not None]
                if outputs:
                    found[place] = Number(*(_digest(event.layer, *forms) for forms in zip(*outputs, strict=True)))
        return found

    def _results(self, event: Operation, number: Number) -> None:
        for key in event.written:
            before = self._contents.get(key, _UNKNOWN)
            self._contents[key] = Number(_digest(before.exact, number.exact), _digest(before.alike, number.alike))
        for index, slot in enumerate(event.outputs):
            if slot is not None and slot.number not in self._values:  # known: it was changed in place
                self._values[slot.number] = Number(*(_digest(form, str(index)) for form in number))

    def _operation(self, event: Operation) -> Number:
        exact, alike = [str(event.function)], [str(event.function)]
        if not has_schema(event.function):  # it takes functions: nobody knows what they compute
            return _both(_digest(*exact, str(id(event))))
        arguments = event.function._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, event.args, strict=False)}
        kinds = {argument.name: str(argument.type) for argument in arguments}
        for name, value in {**given, **event.kwargs}.items():
            number = self._leaf(value)
            integers = "int" in kinds.get(name, "") and _is_integers(value)
            exact.append(f"{name}={number.exact}")
            alike.append(f"{name}" if integers else f"{name}={number.alike}")
        return Number(_digest(*exact), _digest(*alike))

    def _value(self, slot: Slot) -> Number:
        value, content = self._values.get(slot.number, _UNKNOWN), self._contents.get(slot.storage)
        if content is None:
            return value
        return Number(*(_digest(*forms) for forms in zip(value, content, strict=True)))

    def _leaf(self, value: Any) -> Number:
        if isinstance(value, Slot):
            return self._value(value)
        if isinstance(value, Parameter):
            return _both(f"parameter {value.name}")
        if isinstance(value, Tensor):
            return self._constant(value)
        if isinstance(value, (list, tuple)):
            leaves = [self._leaf(item) for item in value]
            return Number(*(f"[{','.join(forms)}]" for forms in zip(*leaves, strict=True))) if leaves else _both("[]")
        return _both(f"{type(value).__name__} {value!r}")

    def _constant(self, value: Tensor) -> Number:
        if id(value) not in self._constants:
            text = f"{value.dtype} {tuple(value.shape)}"
            if not isinstance(value, FakeTensor) and not value.is_meta:
                flat = value.detach().cpu().contiguous().reshape(-1)
                text += hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
            self._constants[id(value)] = value, _both(_digest("constant", text))
        return self._constants[id(value)][1]


def _is_integers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_integers(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def numbered(runs: Sequence[Run], temporal: Sequence[frozenset[int]]) -> list[Mapping[int, Number]]:
    """Number what depends on the time at most.

    Args:
        runs: One after the other.
        temporal: Places of the operators in question, run by run; every other operator has a number of its own.

    Returns:
        Run by run, the numbers of operators and of the outputs of layers, by place in the events.
    """
    numbering = _Numbering()
    return [numbering.run(run, places) for run, places in zip(runs, temporal, strict=True)]
